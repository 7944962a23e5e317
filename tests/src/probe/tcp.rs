//! TCP flows against an echo server: connections that should never break. All in one thread.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::{Pace, Stop, ms};

const RECORD: usize = 64;
/// How long what is under way may take to come back.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a flow may hold back unsent; a record beyond it is not written.
const BACKLOG: usize = 1 << 16;

/// What became of the connections.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct TcpReport {
    /// Connections.
    #[serde(default)]
    pub flows: usize,
    /// Records of 64 bytes written.
    pub sent: u64,
    /// Records that came back, in order and unharmed.
    pub returned: u64,
    /// How the first connection broke, if one did.
    pub broken: Option<String>,
    /// How many broke.
    #[serde(default)]
    pub breaks: usize,
    /// The longest time between two records of a flow coming back, in milliseconds.
    pub largest_gap_ms: f64,
}

/// Runs a TCP probe over so many connections, each at the pace's rate.
///
/// # Errors
/// If a connection cannot be made.
pub fn tcp(pace: &Pace, flows: usize, stop: &Stop) -> Result<TcpReport> {
    ensure!((1..=400).contains(&flows), "{flows} connections: give 1 to 400");
    let mut all = (0..flows).map(|_| Flow::connect(pace)).collect::<Result<Vec<_>>>()?;
    let (start, mut sent) = (Instant::now(), 0_u64);
    let mut ended = None::<Instant>;
    loop {
        if ended.is_none() && (stop.is_set() || pace.length.is_some_and(|l| start.elapsed() >= l)) {
            ended = Some(Instant::now());
        }
        // The flows' turns are spread evenly over time.
        let rate = u64::from(pace.rate.max(1)) * flows as u64;
        let due = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX).saturating_mul(rate);
        while ended.is_none() && sent <= due / 1_000_000 {
            all[(sent % flows as u64) as usize].record();
            sent += 1;
        }
        if let Some(ended) = ended {
            let late = ended.elapsed() > PATIENCE;
            for flow in all.iter_mut().filter(|f| f.is_open()) {
                if late {
                    flow.broken = Some(format!("{} record(s) never came back", flow.sent - flow.returned));
                } else if flow.out.is_empty() {
                    let _ = flow.stream.shutdown(std::net::Shutdown::Write);
                }
            }
            if !all.iter().any(Flow::is_open) {
                break;
            }
        }
        let next = Duration::from_micros((sent * 1_000_000).saturating_sub(due) / rate);
        wait(&mut all, next.clamp(Duration::from_millis(1), Duration::from_millis(50)))?;
    }
    let gap = all.iter().map(|f| f.gap).max().unwrap_or_default();
    Ok(TcpReport {
        flows,
        sent: all.iter().map(|f| f.sent).sum(),
        returned: all.iter().map(|f| f.returned).sum(),
        broken: all.iter().find_map(|f| f.broken.clone()),
        breaks: all.iter().filter(|f| f.broken.is_some()).count(),
        largest_gap_ms: ms(gap),
    })
}

/// Waits until a flow can go on, and lets it.
fn wait(flows: &mut [Flow], timeout: Duration) -> Result<()> {
    let open: Vec<usize> = (0..flows.len()).filter(|n| flows[*n].is_open()).collect();
    let mut polled: Vec<_> = open
        .iter()
        .map(|n| {
            let write = if flows[*n].out.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
            PollFd::new(flows[*n].stream.as_fd(), PollFlags::POLLIN | write)
        })
        .collect();
    poll(&mut polled, PollTimeout::try_from(timeout).unwrap_or(PollTimeout::ZERO))?;
    let ready: Vec<bool> = polled.iter().map(|p| p.any().unwrap_or(true)).collect();
    for n in open.iter().zip(ready).filter_map(|(n, ready)| ready.then_some(*n)) {
        flows[n].write();
        flows[n].read();
    }
    Ok(())
}

struct Flow {
    stream: TcpStream,
    sent: u64,
    returned: u64,
    out: Vec<u8>,
    back: Vec<u8>,
    last: Option<Instant>,
    gap: Duration,
    closed: bool,
    broken: Option<String>,
}

impl Flow {
    fn connect(pace: &Pace) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&pace.to, Duration::from_secs(5))
            .with_context(|| format!("connecting to {}", pace.to))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            sent: 0,
            returned: 0,
            out: Vec::new(),
            back: Vec::new(),
            last: None,
            gap: Duration::ZERO,
            closed: false,
            broken: None,
        })
    }

    fn is_open(&self) -> bool {
        !self.closed && self.broken.is_none()
    }

    fn record(&mut self) {
        if !self.is_open() || self.out.len() + RECORD > BACKLOG {
            return;
        }
        let mut record = [0; RECORD];
        record[..8].copy_from_slice(&self.sent.to_be_bytes());
        self.out.extend(record);
        self.sent += 1;
        self.write();
    }

    fn write(&mut self) {
        while !self.out.is_empty() && self.is_open() {
            match self.stream.write(&self.out) {
                Ok(len) => drop(self.out.drain(..len)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => self.broken = Some(format!("writing: {error}")),
            }
        }
    }

    fn read(&mut self) {
        let mut buffer = [0; 4096];
        while self.is_open() {
            match self.stream.read(&mut buffer) {
                Ok(0) if self.back.is_empty() && self.returned == self.sent => self.closed = true,
                Ok(0) => self.broken = Some("closed by the other side".to_owned()),
                Ok(len) => self.take(&buffer[..len]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => self.broken = Some(format!("reading: {error}")),
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        self.back.extend(bytes);
        let whole = self.back.len() / RECORD * RECORD;
        for record in self.back.drain(..whole).collect::<Vec<_>>().chunks(RECORD) {
            if record[..8] != self.returned.to_be_bytes() {
                self.broken = Some(format!("record {} came back altered", self.returned));
                return;
            }
            let now = Instant::now();
            self.gap = self.gap.max(self.last.map_or(Duration::ZERO, |last| now - last));
            self.last = Some(now);
            self.returned += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Echoes; the `broken`th connection is closed after its first bytes.
    fn server(broken: usize) -> std::net::SocketAddr {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for (n, stream) in listener.incoming().flatten().enumerate() {
                std::thread::spawn(move || {
                    let (mut stream, mut buffer) = (stream, [0; 1000]);
                    while let Ok(len @ 1..) = stream.read(&mut buffer) {
                        if n == broken || stream.write_all(&buffer[..len]).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        to
    }

    #[test]
    fn many_flows_come_back_whole() {
        let pace = Pace { to: server(usize::MAX), rate: 50, length: Some(Duration::from_millis(300)) };
        let report = tcp(&pace, 20, &Stop::default()).unwrap();
        assert!(report.broken.is_none() && report.flows == 20, "{report:?}");
        assert!(report.sent >= 200 && report.returned == report.sent, "{report:?}");
    }

    #[test]
    fn a_broken_flow_is_told_and_the_others_go_on() {
        let pace = Pace { to: server(3), rate: 50, length: Some(Duration::from_millis(300)) };
        let report = tcp(&pace, 10, &Stop::default()).unwrap();
        assert_eq!(report.breaks, 1, "{report:?}");
        assert!(report.returned > 50, "{report:?}");
    }
}
