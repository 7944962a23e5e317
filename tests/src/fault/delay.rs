//! A longer wire: packets wait in the kernel's queue to user space (NFQUEUE) until their time has come. For kernels
//! without netem.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nfq::{Message, Queue, Verdict};

use crate::Lab;

/// Numbers of queues, one for each delay.
const QUEUES: std::ops::Range<u16> = 4500..4564;
/// The most that may be under way.
const LENGTH: u32 = 65_536;
/// How exact it is.
const TICK: Duration = Duration::from_micros(500);

/// A delay in force; ends when dropped, and lets go of what is under way.
#[derive(Debug)]
pub(super) struct Delay {
    queue: u16,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Its rules, without the action.
    rules: Vec<[String; 3]>,
}

impl Delay {
    pub(super) fn start(lab: &Lab, a: &str, b: &str, ms: u32, jitter: u32, taken: &[u16]) -> Result<Self> {
        ensure!(a != b, "a fault needs two ends, not {a} twice");
        let cluster = |name: &str| lab.topology().nodes().find(|n| n.name == name).map(|n| n.cluster.clone());
        let inside = |x: &str, y: &str| cluster(x).is_some_and(|c| c == y || Some(c) == cluster(y));
        ensure!(
            !inside(a, b) && !inside(b, a),
            "{a} and {b} are of one cluster: a delay is a property of the wire between clusters"
        );
        let (from, to) = (lab.topology().underlay(a)?, lab.topology().underlay(b)?);
        let queue = QUEUES.into_iter().find(|q| !taken.contains(q)).context("too many delays at once")?;
        let ended = Arc::new(AtomicBool::new(false));
        let (ready, started) = mpsc::channel();
        let stop = ended.clone();
        let thread = lab.wire().spawn(move || match open(queue) {
            Ok(queue) => {
                let _ = ready.send(Ok(()));
                carry(queue, Duration::from_millis(ms.into()), Duration::from_millis(jitter.into()), &stop);
            }
            Err(error) => drop(ready.send(Err(error))),
        })?;
        let mut delay = Self { queue, ended, thread: Some(thread), rules: Vec::new() };
        started.recv_timeout(Duration::from_secs(5)).context("opening a queue of packets")??;
        for (from, to) in [(&from, &to), (&to, &from)] {
            for (program, v4) in [("iptables", true), ("ip6tables", false)] {
                let set = |list: &[IpAddr]| {
                    let list: Vec<_> =
                        list.iter().filter(|a| a.is_ipv4() == v4).map(ToString::to_string).collect();
                    list.join(",")
                };
                delay.rules.push([program.to_owned(), set(from), set(to)]);
            }
        }
        for rule in &delay.rules {
            rules(lab, "-A", rule, queue).context("a delay needs iptables with NFQUEUE")?;
        }
        Ok(delay)
    }

    pub(super) fn queue(&self) -> u16 {
        self.queue
    }

    /// Takes the rules back, then lets go of what is under way.
    pub(super) fn end(self, lab: &Lab) -> Result<()> {
        self.rules.iter().try_for_each(|rule| rules(lab, "-D", rule, self.queue))
    }
}

fn rules(lab: &Lab, action: &str, [program, from, to]: &[String; 3], queue: u16) -> Result<()> {
    let queue = queue.to_string();
    let what = [program, "-w", "-t", "mangle", action, "FORWARD", "-s", from, "-d", to];
    lab.wire().capture(&[&what[..], &["-j", "NFQUEUE", "--queue-num", &queue, "--queue-bypass"]].concat())?;
    Ok(())
}

impl Drop for Delay {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn open(number: u16) -> Result<Queue> {
    let open = || -> std::io::Result<Queue> {
        let mut queue = Queue::open()?;
        queue.bind(number)?;
        queue.set_queue_max_len(number, LENGTH)?;
        // Whole packets are not needed: the kernel keeps them.
        queue.set_copy_range(number, 0)?;
        queue.set_recv_enobufs(false)?;
        queue.set_nonblocking(true);
        Ok(queue)
    };
    match open() {
        Ok(queue) => Ok(queue),
        Err(error) => bail!("this kernel gives no packets to user space (nfnetlink_queue): {error}"),
    }
}

struct Waiting {
    due: Instant,
    number: u64,
    message: Message,
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Waiting {}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

/// Lets each packet go when it is due, until the end; then all.
fn carry(mut queue: Queue, delay: Duration, jitter: Duration, ended: &AtomicBool) {
    let (mut waiting, mut number, mut dice) = (BinaryHeap::new(), 0, Dice(0x9e37_79b9_7f4a_7c15));
    loop {
        while let Ok(message) = queue.recv() {
            let late = delay - jitter + jitter.mul_f64(2.0 * dice.throw());
            waiting.push(Reverse(Waiting { due: Instant::now() + late, number, message }));
            number += 1;
        }
        let now = Instant::now();
        let over = ended.load(Ordering::Relaxed);
        while waiting.peek().is_some_and(|Reverse(first)| over || first.due <= now) {
            let Some(Reverse(Waiting { mut message, .. })) = waiting.pop() else { break };
            message.set_verdict(Verdict::Accept);
            // A packet whose device went away is refused: it is gone anyway.
            let _ = queue.verdict(message);
        }
        if over {
            return;
        }
        let next = waiting.peek().map_or(TICK, |Reverse(first)| first.due.saturating_duration_since(now));
        std::thread::sleep(next.min(TICK));
    }
}

/// Even numbers of a fixed sequence (xorshift64): a lab's jitter is the same each time.
struct Dice(u64);

impl Dice {
    /// 0 up to 1.
    fn throw(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dice_are_fair_enough() {
        let mut dice = Dice(7);
        let throws: Vec<_> = (0..10_000).map(|_| dice.throw()).collect();
        let mean = throws.iter().sum::<f64>() / 10_000.0;
        assert!(throws.iter().all(|t| (0.0..1.0).contains(t)) && (0.48..0.52).contains(&mean), "{mean}");
    }
}
