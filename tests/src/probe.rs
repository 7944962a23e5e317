//! Probes: steady flows that count what is lost, doubled, reordered or late, and how long the worst gap was.

mod dns;
mod ping;
mod tcp;
mod udp;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use dns::{DnsReport, Question, ask, dns};
pub use ping::{Echo, ping};
pub use tcp::{TcpReport, tcp};
pub use udp::{Loss, UdpReport, udp};

/// How a probe runs.
#[derive(Debug, Clone)]
pub struct Pace {
    /// Whom to ask.
    pub to: SocketAddr,
    /// Packets, records or queries a second.
    pub rate: u32,
    /// How long; none: until [`Stop`].
    pub length: Option<Duration>,
}

/// Tells a probe to stop sending; it then waits for what is under way.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Stops.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Stops when the standard input ends: how the lab stops a probe that it started.
    pub fn on_end_of_input(&self) {
        let stop = self.clone();
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            stop.set();
        });
    }
}

/// Any probe's report.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Report {
    /// Of [`udp()`].
    Udp(UdpReport),
    /// Of [`tcp()`].
    Tcp(TcpReport),
    /// Of [`dns()`].
    Dns(DnsReport),
}

/// Room for seconds of packets, so that a prober or an echo server that gets no CPU for a moment is not what loses them.
pub(crate) fn make_room(socket: &std::net::UdpSocket) -> nix::Result<()> {
    nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::RcvBufForce, &(8 << 20))
}

/// Length of [`ProbePacket`] on the wire.
pub const PROBE_LEN: usize = 32;
const MAGIC: [u8; 8] = *b"tmblprb1";

/// A UDP probe's packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbePacket {
    /// Which probe.
    pub flow: u64,
    /// Which packet of it, from 0.
    pub sequence: u64,
    /// In the echo: how many packets of the flow had come there.
    pub count: u64,
}

impl ProbePacket {
    /// From a datagram.
    #[must_use]
    pub fn read(datagram: &[u8]) -> Option<Self> {
        let bytes = datagram.first_chunk::<PROBE_LEN>()?;
        let word = |at: usize| bytes[at..at + 8].try_into().map(u64::from_be_bytes).unwrap_or_default();
        (bytes[..8] == MAGIC).then(|| Self { flow: word(8), sequence: word(16), count: word(24) })
    }

    /// As a datagram.
    #[must_use]
    pub fn write(&self) -> [u8; PROBE_LEN] {
        let mut bytes = [0; PROBE_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.flow.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_be_bytes());
        bytes[24..].copy_from_slice(&self.count.to_be_bytes());
        bytes
    }
}

/// Calls `send` with 0, 1, 2, ... at the pace's rate until its end. A late call is made up for at once, so the number
/// sent does not depend on the scheduler.
pub(crate) fn paced(pace: &Pace, stop: &Stop, mut send: impl FnMut(u64)) -> u64 {
    let start = Instant::now();
    let mut sent = 0;
    while !stop.is_set() && pace.length.is_none_or(|length| start.elapsed() < length) {
        let due =
            u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX).saturating_mul(pace.rate.into());
        while sent <= due / 1_000_000 {
            send(sent);
            sent += 1;
        }
        // Until the next is due, but no longer than a stop may take to be seen; and never spin.
        let next = (sent * 1_000_000).saturating_sub(due) / u64::from(pace.rate.max(1));
        std::thread::sleep(Duration::from_micros(next.clamp(200, 50_000)));
    }
    sent
}

/// Milliseconds, with fractions.
pub(crate) fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// The value below which `percent` of the sorted values lie.
pub(crate) fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_read_back() {
        let packet = ProbePacket { flow: 7, sequence: 8, count: 9 };
        assert_eq!(ProbePacket::read(&packet.write()), Some(packet));
        assert_eq!(ProbePacket::read(&packet.write()[1..]), None);
        assert_eq!(ProbePacket::read(&[0; 40]), None);
    }

    #[test]
    fn percentiles() {
        let sorted: Vec<_> = (1..=100).map(Duration::from_millis).collect();
        assert_eq!(percentile(&sorted, 99), Duration::from_millis(99));
        assert_eq!(percentile(&sorted, 50), Duration::from_millis(50));
        assert_eq!(percentile(&[], 50), Duration::ZERO);
    }
}
