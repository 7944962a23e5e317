//! A load of DNS questions over UDP, with messages built by hand so that no library retries behind our back.

use std::collections::BTreeMap;
use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{Pace, Stop, ms, paced, percentile};

/// A question.
#[derive(Debug, Clone)]
pub struct Question {
    /// The name, without the dot at its end.
    pub name: String,
    /// 1 for A, 28 for AAAA, 33 for SRV, 16 for TXT.
    pub kind: u16,
}

/// What became of the questions.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct DnsReport {
    /// Questions sent.
    pub sent: u64,
    /// Answers by response code: 0 is no error, 3 a name that does not exist.
    pub answers: BTreeMap<u8, u64>,
    /// Answers without a record, whatever their code.
    pub empty: u64,
    /// Answers with an address that was not expected (none, if nothing was).
    #[serde(default)]
    pub wrong: u64,
    /// Questions that our own kernel reported as undeliverable: no socket was open at the server.
    pub refused: u64,
    /// Questions without an answer within a second.
    pub unanswered: u64,
    /// Half of the answers took less, in milliseconds.
    pub p50_ms: f64,
    /// 99 of a hundred took less, in milliseconds.
    pub p99_ms: f64,
    /// The slowest answer that came within a second, in milliseconds.
    pub max_ms: f64,
}

/// Asks one question again and again. With addresses to expect, an answer that has any other is wrong.
///
/// # Errors
/// If the socket cannot be made or the name is none.
pub fn dns(pace: &Pace, question: &Question, expect: &[IpAddr], stop: &Stop) -> Result<DnsReport> {
    let template = message(question, 0)?;
    let any = if pace.to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    super::make_room(&socket)?;
    socket.connect(pace.to).with_context(|| format!("connecting to {}", pace.to))?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let (mut report, drained) = (DnsReport::default(), Stop::default());
    // A number is used again after 65,536 questions; its last use must be a second old.
    ensure!(pace.rate <= 30_000, "at most 30000 questions a second");
    let pending = std::sync::Mutex::new(vec![None::<Instant>; 1 << 16]);
    let lock = || pending.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let received = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut received = Received::default();
            let mut buffer = [0; 4096];
            while !drained.is_set() {
                match socket.recv(&mut buffer) {
                    Ok(len) if len >= 12 && buffer[2] & 0x80 != 0 => {
                        let id = u16::from_be_bytes([buffer[0], buffer[1]]);
                        let Some(asked) = lock()[usize::from(id)].take() else { continue };
                        *received.answers.entry(buffer[3] & 15).or_default() += 1;
                        received.empty += u64::from(buffer[6..8] == [0, 0]);
                        let wrong = |list: Vec<IpAddr>| list.iter().any(|a| !expect.contains(a));
                        let wrong = !expect.is_empty() && addresses(&buffer[..len]).is_none_or(wrong);
                        received.wrong += u64::from(wrong);
                        received.times.push(asked.elapsed());
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                        received.refused += 1
                    }
                    _ => {}
                }
            }
            received
        });
        report.sent = paced(pace, stop, |sequence| {
            let id = (sequence & 0xffff) as u16;
            let mut query = template.clone();
            query[..2].copy_from_slice(&id.to_be_bytes());
            lock()[usize::from(id)] = Some(Instant::now());
            if socket.send(&query).is_err() {
                report.refused += 1;
            }
        });
        std::thread::sleep(Duration::from_secs(1));
        drained.set();
        receiver.join().unwrap_or_default()
    });
    report.refused += received.refused;
    let mut times = received.times;
    times.sort_unstable();
    times.truncate(times.partition_point(|t| *t <= Duration::from_secs(1)));
    report.unanswered = report.sent.saturating_sub(times.len() as u64);
    report.answers = received.answers;
    report.empty = received.empty;
    report.wrong = received.wrong;
    report.p50_ms = ms(percentile(&times, 50));
    report.p99_ms = ms(percentile(&times, 99));
    report.max_ms = ms(times.last().copied().unwrap_or_default());
    Ok(report)
}

#[derive(Default)]
struct Received {
    answers: BTreeMap<u8, u64>,
    empty: u64,
    wrong: u64,
    refused: u64,
    times: Vec<Duration>,
}

/// One question to a server, one answer: the response code and the addresses of A and AAAA records.
///
/// # Errors
/// If no answer comes within the time, or an undeliverable one.
pub fn ask(
    server: std::net::SocketAddr,
    question: &Question,
    timeout: Duration,
) -> Result<(u8, Vec<IpAddr>)> {
    let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(timeout))?;
    socket.send(&message(question, 1)?)?;
    let mut buffer = [0; 4096];
    let len = socket.recv(&mut buffer).with_context(|| format!("waiting for {server}"))?;
    let answer = &buffer[..len];
    ensure!(len >= 12, "an answer of {len} bytes");
    Ok((answer[3] & 15, addresses(answer).unwrap_or_default()))
}

fn message(question: &Question, id: u16) -> Result<Vec<u8>> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in question.name.trim_end_matches('.').split('.') {
        let len = u8::try_from(label.len()).ok().filter(|len| (1..=63).contains(len));
        bytes.push(len.with_context(|| format!("{:?} is no name", question.name))?);
        bytes.extend(label.bytes());
    }
    bytes.push(0);
    bytes.extend(question.kind.to_be_bytes());
    bytes.extend([0, 1]);
    Ok(bytes)
}

/// The addresses in an answer's first section; none if it is malformed.
fn addresses(message: &[u8]) -> Option<Vec<IpAddr>> {
    let count = u16::from_be_bytes([*message.get(6)?, *message.get(7)?]);
    let mut at = skip_name(message, 12)? + 4;
    let mut list = Vec::new();
    for _ in 0..count {
        at = skip_name(message, at)?;
        let head = message.get(at..at + 10)?;
        let len = usize::from(u16::from_be_bytes([head[8], head[9]]));
        let data = message.get(at + 10..at + 10 + len)?;
        match (head[1], len) {
            (1, 4) => list.push(IpAddr::from(<[u8; 4]>::try_from(data).ok()?)),
            (28, 16) => list.push(IpAddr::from(<[u8; 16]>::try_from(data).ok()?)),
            _ => {}
        }
        at += 10 + len;
    }
    Some(list)
}

fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            n if n & 0xc0 == 0xc0 => return Some(at + 2),
            n => at += 1 + usize::from(n),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_as_rfc_1035_says() {
        let question = Question { name: "a.bc".to_owned(), kind: 28 };
        let bytes = message(&question, 0x1234).unwrap();
        assert_eq!(bytes, b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x02bc\x00\x00\x1c\x00\x01");
        assert!(message(&Question { name: "a..b".to_owned(), kind: 1 }, 0).is_err());
    }

    #[test]
    fn addresses_are_read_and_garbage_is_not() {
        let mut answer = message(&Question { name: "a".to_owned(), kind: 1 }, 1).unwrap();
        answer[7] = 1;
        answer.extend(b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x05\x00\x04\x0a\x01\x02\x03");
        assert_eq!(addresses(&answer), Some(vec!["10.1.2.3".parse().unwrap()]));
        for cut in 0..answer.len() {
            assert_ne!(addresses(&answer[..cut]), Some(vec!["10.1.2.3".parse().unwrap()]));
        }
    }
}
