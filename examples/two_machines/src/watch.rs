//! Ends the process where it would wait forever.

use std::process::exit;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{panic, thread};

/// Ends the process if any of its threads panics. Timely's threads panic when a connection breaks or brings
/// bytes that they cannot read; the workers would wait for the rest.
pub(crate) fn end_with_any_thread() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        print(info);
        eprintln!("error: a thread failed, which ends the process");
        exit(1);
    }));
}

/// Ends the process if the workers do not finish an exchange in time: another one hangs or never came.
#[derive(Clone)]
pub(crate) struct Watch(Arc<Mutex<Option<Instant>>>);

impl Watch {
    pub(crate) fn start(patience: Duration) -> Self {
        let watch = Self(Arc::new(Mutex::new(Some(Instant::now()))));
        let watched = watch.clone();
        thread::spawn(move || {
            while let Some(last) = watched.last() {
                if last.elapsed() > patience {
                    let seconds = patience.as_secs();
                    eprintln!("error: no word from another worker for {seconds} seconds");
                    exit(1);
                }
                thread::sleep(Duration::from_millis(100));
            }
        });
        watch
    }

    /// Called after every exchange.
    pub(crate) fn beat(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    pub(crate) fn stop(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn last(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
