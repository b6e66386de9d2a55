//! Line plots with logarithmic axes, as SVG.
//!
//! Written here, because the page needs elements with classes: colours that follow light and dark mode, names
//! at the ends of lines, lines that light up, and titles of points. The SVG of `plotters` has fixed colours and
//! no classes, and `charming` draws with a script from the network or with V8.

/// A name, a colour, and points with labels.
pub(crate) struct Line<'a> {
    pub(crate) name: &'a str,
    pub(crate) color: &'a str,
    pub(crate) points: Vec<(f64, f64, &'a str)>,
}

// The edges of the axes in a picture of 580 × 370; names are to the right of them.
const LEFT: f64 = 52.0;
const RIGHT: f64 = 404.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 328.0;
/// The distance between two names.
const LINE_HEIGHT: f64 = 17.0;

/// A logarithmic axis between two ends in the picture.
struct Axis {
    low: f64,
    high: f64,
    ends: [f64; 2],
}

impl Axis {
    fn over(values: impl Iterator<Item = f64> + Clone, room: f64, ends: [f64; 2]) -> Self {
        let low = values.clone().fold(f64::INFINITY, f64::min) / room;
        Self { low, high: values.fold(0.0, f64::max) * room, ends }
    }

    fn at(&self, value: f64) -> f64 {
        let share = (value / self.low).ln() / (self.high / self.low).ln();
        self.ends[0] + share * (self.ends[1] - self.ends[0])
    }

    /// Powers of ten, and also 2 and 5 times these if there are few.
    fn ticks(&self) -> Vec<f64> {
        let factors: &[f64] = if self.high / self.low < 200.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let powers = self.low.log10().floor() as i32..=self.high.log10() as i32 + 1;
        let ticks = powers.flat_map(|power| factors.iter().map(move |f| f * 10f64.powi(power)));
        ticks.filter(|tick| (self.low..=self.high).contains(tick)).collect()
    }
}

/// Formats a number with about three digits.
pub(crate) fn figure(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value if value >= 0.1 => format!("{value:.2}"),
        value => format!("{value:.3}"),
    }
}

/// Formats the number of a tick, like 0.05, 20, 16k.
fn number(value: f64) -> String {
    match value {
        value if value >= 1e4 => format!("{:.0}k", value / 1e3),
        value if value >= 1.0 => format!("{value:.0}"),
        value => format!("{value:.5}").trim_end_matches('0').to_owned(),
    }
}

/// Names of axes include units. `x_ticks` are for an axis of sizes; without them the axis chooses its ticks.
pub(crate) fn plot(
    [x_name, y_name]: [&str; 2],
    x_ticks: Option<&[f64]>,
    lines: &[Line<'_>],
) -> String {
    let points = lines.iter().flat_map(|line| &line.points);
    let x_axis = Axis::over(points.clone().map(|point| point.0), 1.04, [LEFT, RIGHT]);
    let y_axis = Axis::over(points.map(|point| point.1), 1.2, [BOTTOM, TOP]);
    let mut svg = String::from(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 580 370'><g class='axes'>",
    );
    svg += &format!("<text x='4' y='{}'>{y_name}</text>", TOP - 14.0);
    for tick in x_ticks.map_or_else(|| x_axis.ticks(), <[f64]>::to_vec) {
        let (x, label) = (x_axis.at(tick), number(tick));
        svg += &format!(
            "<path d='M{x:.1} {TOP}V{BOTTOM}'/><text x='{x:.1}' y='{}' text-anchor='middle'>{label}</text>",
            BOTTOM + 17.0
        );
    }
    for tick in y_axis.ticks() {
        let (y, label) = (y_axis.at(tick), number(tick));
        svg += &format!(
            "<path d='M{LEFT} {y:.1}H{RIGHT}'/><text x='{}' y='{:.1}' text-anchor='end'>{label}</text>",
            LEFT - 6.0,
            y + 4.0
        );
    }
    let middle = (LEFT + RIGHT) / 2.0;
    svg += &format!("<text x='{middle}' y='366' text-anchor='middle'>{x_name}</text></g>");

    let mut ends: Vec<_> =
        lines.iter().filter_map(|line| Some((line, *line.points.last()?))).collect();
    ends.sort_by(|(_, a), (_, b)| b.1.total_cmp(&a.1));
    let ys: Vec<_> = ends.iter().map(|(_, (_, y, _))| y_axis.at(*y)).collect();
    for ((line, (end, last, _)), (y, name_y)) in ends.iter().zip(ys.iter().zip(spread(&ys))) {
        let Line { name, color, points } = line;
        let places = points.iter().map(|(x, y, _)| (x_axis.at(*x), y_axis.at(*y)));
        let path: Vec<_> = places.clone().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        svg += &format!(
            "<g class='line {name}' style='color:{color}' tabindex='0' role='img' \
             aria-label='{name}: {y_name} = {} at {x_name} = {}'><polyline points='{}'/>\
             <path d='M{:.1} {y:.1}L{} {name_y:.1}'/><text x='{}' y='{:.1}'>{name}</text>",
            figure(*last),
            figure(*end),
            path.join(" "),
            x_axis.at(*end) + 5.0,
            RIGHT + 26.0,
            RIGHT + 30.0,
            name_y + 4.0
        );
        for ((x, y), (x_value, y_value, beside)) in places.zip(points) {
            svg += &format!(
                "<circle cx='{x:.1}' cy='{y:.1}' r='3'><title>{name}{}{beside}: {} = {}, {y_name} \
                 = {}</title></circle><text class='beside' x='{:.1}' y='{:.1}'>{beside}</text>",
                if beside.is_empty() { "" } else { " " },
                x_name,
                figure(*x_value),
                figure(*y_value),
                x + 5.0,
                y - 9.0
            );
        }
        svg += "</g>";
    }
    svg + "</svg>"
}

/// Moves sorted positions apart if names would overlap: down, then up again from the bottom.
fn spread(places: &[f64]) -> Vec<f64> {
    let (mut places, mut free, mut floor) = (places.to_vec(), 0.0, BOTTOM);
    for place in &mut places {
        *place = place.max(free);
        free = *place + LINE_HEIGHT;
    }
    for place in places.iter_mut().rev() {
        *place = place.min(floor);
        floor = *place - LINE_HEIGHT;
    }
    places
}
