//! A UDP flow against an echo server.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{PROBE_LEN, Pace, ProbePacket, Stop, ms, paced};

/// What became of the packets.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct UdpReport {
    /// Packets sent (or refused by our own kernel).
    pub sent: u64,
    /// Different packets that came back.
    pub returned: u64,
    /// `sent - returned`.
    pub lost: u64,
    /// Of these, how many never reached the server, as far as the last echo tells.
    pub lost_out: u64,
    /// Sends that our own kernel refused (no route, connection refused): counted as sent and lost.
    pub refused: u64,
    /// Echoes of a packet that had come back already.
    pub duplicated: u64,
    /// Echoes that came after one of a later packet.
    pub reordered: u64,
    /// The longest time between two echoes, in milliseconds.
    pub largest_gap_ms: f64,
    /// Where packets in a row were lost: the first few such places.
    #[serde(default)]
    pub losses: Vec<Loss>,
}

/// Packets in a row that were lost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    /// When the first was due, in milliseconds after the start.
    pub at_ms: u64,
    /// How many.
    pub packets: u64,
}

/// As many places are told.
const PLACES: usize = 8;

/// Runs a UDP probe with payloads of so many bytes.
///
/// # Errors
/// If the socket cannot be made, or no packet can have that size.
pub fn udp(pace: &Pace, size: usize, stop: &Stop) -> Result<UdpReport> {
    ensure!((PROBE_LEN..=65_000).contains(&size), "a payload of {size} bytes: give {PROBE_LEN} to 65000");
    let any = if pace.to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    super::make_room(&socket)?;
    socket.connect(pace.to).with_context(|| format!("connecting to {}", pace.to))?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let flow = (u64::from(std::process::id()) << 32)
        | std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |t| u64::from(t.subsec_nanos()));
    let (drained, mut report) = (Stop::default(), UdpReport::default());
    let received = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(&socket, flow, &drained));
        let mut payload = vec![0; size];
        report.sent = paced(pace, stop, |sequence| {
            payload[..PROBE_LEN].copy_from_slice(&ProbePacket { flow, sequence, count: 0 }.write());
            if socket.send(&payload).is_err() {
                report.refused += 1;
            }
        });
        std::thread::sleep(Duration::from_secs(1));
        drained.set();
        receiver.join().unwrap_or_default()
    });
    report.returned = received.returned;
    report.lost = report.sent - received.returned;
    report.lost_out = report.sent.saturating_sub(received.count.max(received.returned));
    report.duplicated = received.duplicated;
    report.reordered = received.reordered;
    report.largest_gap_ms = ms(received.gap);
    report.losses = losses(&received.seen, report.sent, pace.rate);
    Ok(report)
}

fn losses(seen: &[u64], sent: u64, rate: u32) -> Vec<Loss> {
    let mut losses: Vec<(u64, Loss)> = Vec::new();
    for sequence in 0..sent {
        if seen.get((sequence / 64) as usize).is_some_and(|word| word & (1 << (sequence % 64)) != 0) {
            continue;
        }
        if let Some((end, last)) = losses.last_mut().filter(|(end, _)| *end == sequence) {
            last.packets += 1;
            *end += 1;
        } else if losses.len() < PLACES {
            let at_ms = sequence * 1000 / u64::from(rate.max(1));
            losses.push((sequence + 1, Loss { at_ms, packets: 1 }));
        } else {
            break;
        }
    }
    losses.into_iter().map(|(_, loss)| loss).collect()
}

#[derive(Default)]
struct Received {
    returned: u64,
    duplicated: u64,
    reordered: u64,
    count: u64,
    gap: Duration,
    /// A bit for each number.
    seen: Vec<u64>,
}

fn receive(socket: &UdpSocket, flow: u64, drained: &Stop) -> Received {
    let mut received = Received::default();
    let (mut highest, mut last) = (None, None::<Instant>);
    let mut buffer = vec![0; 65_536];
    while !drained.is_set() {
        // An ICMP error shows as an error of recv: the loss is counted by the missing echo.
        let Ok(len) = socket.recv(&mut buffer) else { continue };
        let Some(packet) = ProbePacket::read(&buffer[..len]).filter(|p| p.flow == flow) else { continue };
        let now = Instant::now();
        received.gap = received.gap.max(last.map_or(Duration::ZERO, |last| now - last));
        last = Some(now);
        received.count = received.count.max(packet.count);
        let (word, bit) = ((packet.sequence / 64) as usize, 1 << (packet.sequence % 64));
        if word >= received.seen.len() {
            received.seen.resize(word + 1, 0);
        }
        if received.seen[word] & bit != 0 {
            received.duplicated += 1;
            continue;
        }
        received.seen[word] |= bit;
        received.returned += 1;
        if highest.is_some_and(|highest| packet.sequence < highest) {
            received.reordered += 1;
        }
        highest = highest.max(Some(packet.sequence));
    }
    received
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Loses every tenth packet, doubles packet 5.
    #[test]
    fn counts_what_a_bad_server_does() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = server.local_addr().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 100];
            let mut count = 0;
            while let Ok((len, from)) = server.recv_from(&mut buffer) {
                let mut packet = ProbePacket::read(&buffer[..len]).unwrap();
                count += 1;
                packet.count = count;
                if packet.sequence % 10 == 9 {
                    continue;
                }
                for _ in 0..=u8::from(packet.sequence == 5) {
                    server.send_to(&packet.write(), from).unwrap();
                }
            }
        });
        let pace = Pace { to, rate: 1000, length: Some(Duration::from_millis(300)) };
        let report = udp(&pace, PROBE_LEN, &Stop::default()).unwrap();
        assert!(report.sent >= 250, "{report:?}");
        assert_eq!(report.lost, report.sent / 10, "{report:?}");
        assert_eq!(report.duplicated, 1, "{report:?}");
        assert_eq!(report.losses[..2], [Loss { at_ms: 9, packets: 1 }, Loss { at_ms: 19, packets: 1 }]);
        // If the very last packet is one that is not echoed, no later echo tells that it had arrived.
        assert!(report.lost_out <= 1, "{report:?}");
    }
}
