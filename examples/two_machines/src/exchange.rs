//! Messages from every worker to every other one, in rounds.

use crate::watch::Watch;
use graph_attention::Partial;
use graph_attention::ndarray::Array2;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::error::Error;
use std::mem::{replace, take};
use std::rc::Rc;
use std::time::{Duration, Instant};
use timely::container::CapacityContainerBuilder;
use timely::dataflow::channels::pact::Exchange as To;
use timely::dataflow::operators::generic::Operator;
use timely::dataflow::operators::{Input, Probe};
use timely::dataflow::{InputHandleVec, ProbeHandle};
use timely::worker::Worker;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// What a worker sends to another one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Message {
    /// Rows of queries, or of their gradients.
    Rows(Array2<f64>),
    /// Attention of those queries to the receiver's nodes.
    Partial(Partial<f64>),
    /// The gradients of a partial result.
    Gradients { out: Array2<f64>, log_sum_exp: Array2<f64> },
    /// Numbers to add up.
    Numbers(Vec<f64>),
}

impl Message {
    /// The rows and the bytes of its numbers.
    fn size(&self) -> [usize; 2] {
        let numbers = |arrays: &[usize]| 8 * arrays.iter().sum::<usize>();
        match self {
            Self::Rows(rows) => [rows.nrows(), numbers(&[rows.len()])],
            Self::Partial(partial) => {
                let (out, sum) = (partial.out(), partial.sum());
                [out.nrows(), numbers(&[out.len(), 2 * sum.len()])]
            }
            Self::Gradients { out, log_sum_exp } => {
                [out.nrows(), numbers(&[out.len(), log_sum_exp.len()])]
            }
            Self::Numbers(all) => [0, numbers(&[all.len()])],
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Rows(_) => "rows",
            Self::Partial(_) => "a partial result",
            Self::Gradients { .. } => "gradients",
            Self::Numbers(_) => "numbers",
        }
    }

    fn unexpected<T>(&self, from: usize, expected: &str) -> Result<T> {
        Err(format!("expected {expected} from worker {from}, got {}", self.name()).into())
    }

    pub(crate) fn rows(self, from: usize, shape: [usize; 2]) -> Result<Array2<f64>> {
        match self {
            Self::Rows(rows) => shaped(from, "rows", rows, shape),
            other => other.unexpected(from, "rows"),
        }
    }

    /// Its shape is checked where it is merged.
    pub(crate) fn partial(self, from: usize) -> Result<Partial<f64>> {
        match self {
            Self::Partial(partial) => Ok(partial),
            other => other.unexpected(from, "a partial result"),
        }
    }

    /// The shapes are checked by the backward pass.
    pub(crate) fn gradients(self, from: usize) -> Result<[Array2<f64>; 2]> {
        match self {
            Self::Gradients { out, log_sum_exp } => Ok([out, log_sum_exp]),
            other => other.unexpected(from, "gradients"),
        }
    }

    fn numbers(self, from: usize, len: usize) -> Result<Vec<f64>> {
        match self {
            Self::Numbers(numbers) if numbers.len() == len => Ok(numbers),
            Self::Numbers(numbers) => {
                Err(format!("expected {len} numbers from worker {from}, got {}", numbers.len())
                    .into())
            }
            other => other.unexpected(from, "numbers"),
        }
    }
}

fn shaped(from: usize, what: &str, array: Array2<f64>, shape: [usize; 2]) -> Result<Array2<f64>> {
    if array.shape() != shape {
        let actual = array.shape();
        return Err(
            format!("{what} of worker {from}: expected shape {shape:?}, got {actual:?}").into()
        );
    }
    Ok(array)
}

/// A message on its way.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Envelope {
    from: usize,
    to: usize,
    round: u64,
    message: Message,
}

/// What a worker sent to others, and the seconds that it waited for them and that it ran.
pub(crate) struct Traffic {
    pub(crate) rows: usize,
    pub(crate) bytes: usize,
    pub(crate) waiting: f64,
    pub(crate) running: f64,
}

/// One worker's end of all connections. A round is a time of the dataflow.
pub(crate) struct Exchange<'w> {
    worker: &'w mut Worker,
    watch: Watch,
    input: InputHandleVec<u64, Envelope>,
    probe: ProbeHandle<u64>,
    received: Rc<RefCell<Vec<Envelope>>>,
    rows: usize,
    bytes: usize,
    waiting: Duration,
    start: Instant,
}

impl<'w> Exchange<'w> {
    pub(crate) fn new(worker: &'w mut Worker, watch: &Watch) -> Self {
        let received = Rc::new(RefCell::new(Vec::new()));
        let into = Rc::clone(&received);
        let (input, probe) = worker.dataflow(|scope| {
            let (input, stream) = scope.new_input::<Vec<Envelope>>();
            let to = To::new(|envelope: &Envelope| envelope.to as u64);
            let done = stream.unary::<CapacityContainerBuilder<Vec<()>>, _, _, _>(
                to,
                "receive",
                move |_, _| {
                    move |input, _| {
                        input.for_each(|_, envelopes| into.borrow_mut().append(envelopes));
                    }
                },
            );
            (input, done.probe().0)
        });
        Self {
            worker,
            watch: watch.clone(),
            input,
            probe,
            received,
            rows: 0,
            bytes: 0,
            waiting: Duration::ZERO,
            start: Instant::now(),
        }
    }

    /// The number of workers.
    pub(crate) fn len(&self) -> usize {
        self.worker.peers()
    }

    /// Sends a message to each worker and returns one of each, in the order of the workers.
    pub(crate) fn swap(&mut self, mut messages: Vec<Message>) -> Result<Vec<Message>> {
        let me = self.worker.index();
        let round = *self.input.time();
        let own = replace(&mut messages[me], Message::Numbers(vec![]));
        let start = Instant::now();
        for (to, message) in messages.into_iter().enumerate().filter(|&(to, _)| to != me) {
            let [rows, bytes] = message.size();
            self.rows += rows;
            self.bytes += bytes;
            self.input.send(Envelope { from: me, to, round, message });
        }
        self.input.advance_to(round + 1);
        while self.probe.less_than(self.input.time()) {
            self.worker.step_or_park(Some(Duration::from_millis(100)));
        }
        self.waiting += start.elapsed();
        self.watch.beat();

        // Those who are ahead may have sent messages of the next round.
        let (these, later): (Vec<_>, Vec<_>) =
            take(&mut *self.received.borrow_mut()).into_iter().partition(|it| it.round <= round);
        *self.received.borrow_mut() = later;
        let mut all: Vec<Option<Message>> = (0..self.len()).map(|_| None).collect();
        all[me] = Some(own);
        for Envelope { from, round: of_message, message, .. } in these {
            match all.get_mut(from) {
                Some(slot @ None) if of_message == round => *slot = Some(message),
                _ => return Err(format!("an unexpected message of worker {from}").into()),
            }
        }
        let arrived = all.into_iter().enumerate();
        arrived
            .map(|(from, message)| message.ok_or_else(|| format!("worker {from} stopped").into()))
            .collect()
    }

    /// Sends numbers to all workers and returns those of each.
    pub(crate) fn gather(&mut self, numbers: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        let len = numbers.len();
        let all = self.swap(vec![Message::Numbers(numbers); self.len()])?;
        all.into_iter().enumerate().map(|(from, message)| message.numbers(from, len)).collect()
    }

    /// Adds up the numbers of all workers, in their order.
    pub(crate) fn sum(&mut self, numbers: Vec<f64>) -> Result<Vec<f64>> {
        let mut sums = vec![0.0; numbers.len()];
        for numbers in self.gather(numbers)? {
            sums.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number);
        }
        Ok(sums)
    }

    pub(crate) fn traffic(&self) -> Traffic {
        Traffic {
            rows: self.rows,
            bytes: self.bytes,
            waiting: self.waiting.as_secs_f64(),
            running: self.start.elapsed().as_secs_f64(),
        }
    }
}
