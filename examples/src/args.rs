use std::{collections::HashMap, env, error::Error, str::FromStr};

/// The arguments of an example: words, and options such as `--seeds 10`.
#[derive(Clone, Debug, Default)]
pub struct Args {
    pub words: Vec<String>,
    options: HashMap<String, String>,
}

impl Args {
    /// Reads the arguments of this process, whose options must be among the known ones.
    pub fn from_env(known: &[&str]) -> Result<Self, Box<dyn Error>> {
        let mut args = Self::default();
        let mut rest = env::args().skip(1);
        while let Some(arg) = rest.next() {
            match arg.strip_prefix("--") {
                None => args.words.push(arg),
                Some(name) if known.contains(&name) => {
                    let value = rest.next().ok_or_else(|| format!("{arg} needs a value"))?;
                    args.options.insert(name.to_owned(), value);
                }
                Some(_) => return Err(format!("no option {arg}; there are {known:?}").into()),
            }
        }
        Ok(args)
    }

    /// Returns an option, or the default if it is not given.
    pub fn option<T: FromStr>(&self, name: &str, default: T) -> Result<T, Box<dyn Error>> {
        let Some(text) = self.options.get(name) else { return Ok(default) };
        text.parse().map_err(|_| format!("--{name} cannot be {text:?}").into())
    }
}
