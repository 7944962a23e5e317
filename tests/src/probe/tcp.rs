//! A TCP flow against an echo server: one connection that should never break.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{Pace, Stop, ms, paced};

const RECORD: usize = 64;

/// What became of the connection.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct TcpReport {
    /// Records of 64 bytes written.
    pub sent: u64,
    /// Records that came back, in order and unharmed.
    pub returned: u64,
    /// How the connection broke, if it did.
    pub broken: Option<String>,
    /// The longest time between two records coming back, in milliseconds.
    pub largest_gap_ms: f64,
}

/// Runs a TCP probe over one connection.
///
/// # Errors
/// If no connection can be made.
pub fn tcp(pace: &Pace, stop: &Stop) -> Result<TcpReport> {
    let mut stream = TcpStream::connect_timeout(&pace.to, Duration::from_secs(5))
        .with_context(|| format!("connecting to {}", pace.to))?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(Duration::from_secs(60)))?;
    let mut reader = stream.try_clone()?;
    reader.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut report = TcpReport::default();
    let receiver = std::thread::spawn(move || receive(&mut reader));
    let mut broken = None;
    let failed = Stop::default();
    report.sent = paced(pace, stop, |sequence| {
        if failed.is_set() {
            stop.set();
            return;
        }
        let mut record = [0; RECORD];
        record[..8].copy_from_slice(&sequence.to_be_bytes());
        if let Err(error) = stream.write_all(&record) {
            broken = Some(format!("writing: {error}"));
            failed.set();
        }
    });
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let (returned, gap, ended) = receiver.join().unwrap_or_default();
    report.returned = returned;
    report.largest_gap_ms = ms(gap);
    report.broken = broken.or(ended);
    Ok(report)
}

fn receive(stream: &mut TcpStream) -> (u64, Duration, Option<String>) {
    let (mut returned, mut gap, mut last) = (0u64, Duration::ZERO, None::<Instant>);
    let mut record = [0; RECORD];
    loop {
        match stream.read(&mut record[..1]) {
            Ok(0) => return (returned, gap, None),
            Ok(_) => {}
            Err(error) => return (returned, gap, Some(format!("reading: {error}"))),
        }
        if let Err(error) = stream.read_exact(&mut record[1..]) {
            return (returned, gap, Some(format!("reading: {error}")));
        }
        if record[..8] != returned.to_be_bytes() {
            return (returned, gap, Some(format!("record {returned} came back altered")));
        }
        let now = Instant::now();
        gap = gap.max(last.map_or(Duration::ZERO, |last| now - last));
        last = Some(now);
        returned += 1;
    }
}
