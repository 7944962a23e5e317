//! Keys that change under way.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may panic, and show its figures")]

#[allow(dead_code, reason = "shared with other tests")]
mod wire;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tombolo_wireguard::device::{Device, Drops};
use tombolo_wireguard::identity::{GRACE, HOLD, HOLD_MOST};
use tombolo_wireguard::key::PrivateKey;
use tombolo_wireguard::uapi::parse_state;
use wire::{End, carry, now, packet};

/// Packets a second each way, and datagrams that are under way at any time.
const RATE: u32 = 10_000;
const UNDER_WAY: usize = 40;

struct Bench {
    a: End,
    b: End,
    wire: VecDeque<(bool, Vec<u8>)>,
    sent: u32,
    begun: Instant,
}

impl Bench {
    fn new() -> Self {
        let (mut a, mut b) = (End::new(1), End::new(2));
        let to_b =
            format!("endpoint={}\nallowed_ip=10.0.2.0/24\npersistent_keepalive_interval=10\n", b.address);
        let to_a =
            format!("endpoint={}\nallowed_ip=10.0.1.0/24\npersistent_keepalive_interval=10\n", a.address);
        a.peer(&b, &to_b);
        b.peer(&a, &to_a);
        carry(&mut a, &mut b);
        Self { a, b, wire: VecDeque::new(), sent: 0, begun: Instant::now() }
    }

    /// Both send for so many milliseconds, at the rate and in real time.
    fn run(&mut self, ms: u32) {
        for _ in 0..ms * RATE / 1000 {
            let due = Duration::from_secs(1) * self.sent / RATE;
            while self.begun.elapsed() < due {
                std::thread::sleep(Duration::from_micros(100));
            }
            self.a.send(&numbered("10.0.1.1", "10.0.2.1", self.sent));
            self.b.send(&numbered("10.0.2.1", "10.0.1.1", self.sent));
            self.sent += 1;
            if self.sent.is_multiple_of(RATE / 4) {
                self.a.device.handle_tick(now(), &mut self.a.tray);
                self.b.device.handle_tick(now(), &mut self.b.tray);
            }
            self.carry(UNDER_WAY);
        }
    }

    /// Carries datagrams until so many are left under way.
    fn carry(&mut self, left: usize) {
        loop {
            self.wire.extend(self.a.tray.datagrams.drain(..).map(|(_, d)| (true, d)));
            self.wire.extend(self.b.tray.datagrams.drain(..).map(|(_, d)| (false, d)));
            if self.wire.len() <= left {
                return;
            }
            let Some((from_a, datagram)) = self.wire.pop_front() else { return };
            let (from, to) =
                if from_a { (&self.a.address, &mut self.b) } else { (&self.b.address, &mut self.a) };
            to.device.handle_datagram(*from, &datagram, now(), &mut to.tray);
        }
    }

    /// Nothing was lost, doubled or out of order, and nothing was refused that should not have been.
    fn nothing_lost(mut self, title: &str) {
        self.carry(0);
        for (name, end) in [("A", &self.a), ("B", &self.b)] {
            let numbers: Vec<u32> = end.tray.packets.iter().map(|p| number(p)).collect();
            eprintln!(
                "{title}: {} sent to {name} at {RATE} a second, {} lost",
                self.sent,
                self.sent - numbers.len() as u32
            );
            assert!(numbers.iter().copied().eq(0..self.sent), "{name}: {} of {}", numbers.len(), self.sent);
            let Drops { malformed, no_peer, no_endpoint, source, .. } = end.device.drops();
            assert_eq!((malformed, no_peer, no_endpoint, source), (0, 0, 0, 0));
        }
    }
}

fn numbered(source: &str, destination: &str, number: u32) -> Vec<u8> {
    let mut packet = packet(source, destination);
    packet[20..].copy_from_slice(&number.to_be_bytes());
    packet
}

fn number(packet: &[u8]) -> u32 {
    u32::from_be_bytes(packet[20..24].try_into().unwrap())
}

/// Gives an end a new key, as an agent does.
fn rotate(end: &mut End, seed: u8) {
    let new = PrivateKey::new([seed; 32]).unwrap();
    end.set(&format!("private_key={}\nprevious_private_key={}\n", *new.hex(), *end.key.hex()));
    end.key = new;
}

/// Tells an end that a peer's key is another now.
fn learn(end: &mut End, before: &PrivateKey, after: &PrivateKey, allowed: &str) {
    let (before, after) = (before.public().hex(), after.public().hex());
    end.set(&format!(
        "public_key={after}\nreplaces={before}\npersistent_keepalive_interval=10\nallowed_ip={allowed}\n\
         public_key={before}\nremove=true\n"
    ));
}

fn one_peer(end: &End, other: &End) {
    let state = end.state();
    assert_eq!(state.matches("public_key=").count(), 1, "{state}");
    assert!(state.contains(&format!("public_key={}", other.key.public().hex())));
}

#[test]
fn a_rotation_loses_no_packet() {
    let mut bench = Bench::new();
    bench.run(300);
    for seed in [11, 12, 13] {
        let old = bench.a.key.clone();
        rotate(&mut bench.a, seed);
        // The news take their time.
        bench.run(300);
        let new = bench.a.key.clone();
        learn(&mut bench.b, &old, &new, "10.0.1.0/24");
        bench.run(300);
        one_peer(&bench.b, &bench.a);
    }
    bench.nothing_lost("one end rotates, three times");
}

#[test]
fn both_ends_may_rotate_at_once() {
    for first in [true, false] {
        let mut bench = Bench::new();
        bench.run(200);
        let (old_a, old_b) = (bench.a.key.clone(), bench.b.key.clone());
        rotate(&mut bench.a, 11);
        rotate(&mut bench.b, 12);
        bench.run(200);
        let (new_a, new_b) = (bench.a.key.clone(), bench.b.key.clone());
        for turn in [first, !first] {
            if turn {
                learn(&mut bench.a, &old_b, &new_b, "10.0.2.0/24");
            } else {
                learn(&mut bench.b, &old_a, &new_a, "10.0.1.0/24");
            }
            bench.run(200);
        }
        // A call that met nobody is repeated after 5 s.
        let deadline = Instant::now() + Duration::from_secs(7);
        while Instant::now() < deadline {
            bench.run(100);
        }
        // By the new keys alone.
        for end in [&mut bench.a, &mut bench.b] {
            let key = end.key.clone();
            end.set(&format!("private_key={}\nprevious_private_key={}\n", *key.hex(), "0".repeat(64)));
        }
        bench.run(200);
        bench.nothing_lost("both ends rotate");
    }
}

#[test]
fn a_peer_that_is_removed_says_nothing_more() {
    // In the midst of rotations too.
    for (rotated, learned) in [(false, false), (true, false), (true, true)] {
        let mut bench = Bench::new();
        bench.run(50);
        let old = bench.a.key.clone();
        if rotated {
            rotate(&mut bench.a, 11);
            bench.run(50);
        }
        if learned {
            let new = bench.a.key.clone();
            learn(&mut bench.b, &old, &new, "10.0.1.0/24");
            bench.run(50);
        }
        bench.carry(0);
        let (at_a, at_b) = (bench.a.tray.packets.len(), bench.b.tray.packets.len());
        // Some are under way.
        (0..20).for_each(|n| bench.a.send(&numbered("10.0.1.1", "10.0.2.1", n)));
        let known = if learned { bench.a.key.public() } else { old.public() };
        bench.b.set(&format!("public_key={}\nremove=true\n", known.hex()));
        bench.run(300);
        bench.carry(0);
        assert_eq!(bench.b.tray.packets.len(), at_b);
        assert_eq!(bench.a.tray.packets.len(), at_a);
    }
}

#[test]
fn a_removal_that_replaces_nobody_is_one() {
    let mut bench = Bench::new();
    bench.run(50);
    bench.carry(0);
    let before = bench.b.tray.packets.len();
    // What plain `wg syncconf` does for a peer with another key: no word of the old one's sessions.
    let (old, new) = (bench.a.key.public().hex(), PrivateKey::new([11; 32]).unwrap().public().hex());
    bench.b.set(&format!("public_key={old}\nremove=true\npublic_key={new}\nallowed_ip=10.0.1.0/24\n"));
    bench.a.send(&numbered("10.0.1.1", "10.0.2.1", 0));
    bench.carry(0);
    assert_eq!(bench.b.tray.packets.len(), before);
    // Nor may one peer take another's place.
    let third = PrivateKey::new([12; 32]).unwrap().public().hex();
    bench.b.set(&format!("public_key={third}\nallowed_ip=10.0.3.0/24\n"));
    bench.b.set(&format!("public_key={third}\nreplaces={new}\n"));
    assert_eq!(bench.b.state().matches("public_key=").count(), 2);
}

#[test]
fn a_plain_key_ends_the_one_before() {
    let mut bench = Bench::new();
    bench.run(20);
    rotate(&mut bench.a, 11);
    assert!(bench.a.state().contains("previous_private_key="));
    let plain = PrivateKey::new([12; 32]).unwrap();
    bench.a.set(&format!("private_key={}\n", *plain.hex()));
    assert!(!bench.a.state().contains("previous_private_key="));
    bench.carry(0);
    let before = bench.a.tray.packets.len();
    bench.b.send(&numbered("10.0.2.1", "10.0.1.1", 0));
    bench.carry(0);
    assert_eq!(bench.a.tray.packets.len(), before);
    // The same key again says nothing of the one before.
    rotate(&mut bench.a, 13);
    let same = bench.a.key.clone();
    bench.a.set(&format!("private_key={}\n", *same.hex()));
    assert!(bench.a.state().contains("previous_private_key="));
}

#[test]
fn a_worker_that_dies_in_the_midst_goes_on_with_both_keys() {
    for learned in [false, true] {
        let mut bench = Bench::new();
        bench.run(50);
        let old = bench.a.key.clone();
        rotate(&mut bench.a, 11);
        bench.run(50);
        if learned {
            let new = bench.a.key.clone();
            learn(&mut bench.b, &old, &new, "10.0.1.0/24");
            bench.run(50);
        }
        bench.carry(0);
        let state = bench.a.state();
        bench.a.device = Device::new(77);
        bench.a.device.resume(
            parse_state(&state).unwrap_or_else(|e| panic!("{e}")),
            now(),
            &mut bench.a.tray,
        );
        bench.carry(0);
        assert!(bench.a.state().contains(&format!("previous_private_key={}", *old.hex())));
        let (at_a, at_b) = (bench.a.tray.packets.len(), bench.b.tray.packets.len());
        bench.a.send(&numbered("10.0.1.1", "10.0.2.1", 1));
        bench.carry(0);
        bench.b.send(&numbered("10.0.2.1", "10.0.1.1", 1));
        bench.carry(0);
        assert_eq!(
            (bench.a.tray.packets.len(), bench.b.tray.packets.len()),
            (at_a + 1, at_b + 1),
            "{learned}"
        );
    }
}

#[test]
fn the_previous_key_goes_when_nobody_needs_it() {
    let late = |end: &mut End, by: Duration| {
        let mut at = now();
        at.now += by;
        end.device.handle_tick(at, &mut end.tray);
    };
    let mut bench = Bench::new();
    bench.run(20);
    let old = bench.a.key.clone();
    rotate(&mut bench.a, 11);
    late(&mut bench.a, HOLD * 2);
    // B has nothing else yet.
    assert!(bench.a.state().contains("previous_private_key="));
    late(&mut bench.a, HOLD_MOST + HOLD);
    assert!(!bench.a.state().contains("previous_private_key="));

    let mut bench = Bench::new();
    bench.run(20);
    rotate(&mut bench.a, 11);
    let new = bench.a.key.clone();
    learn(&mut bench.b, &old, &new, "10.0.1.0/24");
    bench.run(50);
    late(&mut bench.a, GRACE);
    assert!(bench.a.state().contains("previous_private_key="));
    late(&mut bench.a, HOLD * 2);
    assert!(!bench.a.state().contains("previous_private_key="));
}

#[test]
fn a_clock_behind_the_last_call_is_noticed_until_the_key_is_another_or_it_catches_up() {
    let hour = Duration::from_secs(3600);
    let start = |key: &PrivateKey| {
        let mut end = End::new(5);
        end.set(&format!("private_key={}\n", "0".repeat(64)));
        end.device.stamps().remember(key.public(), now().wall + hour);
        end.set(&format!("private_key={}\n", *key.hex()));
        end
    };
    let key = PrivateKey::new([5; 32]).unwrap();
    let mut end = start(&key);
    let behind = end.device.behind(now().wall).unwrap();
    assert!(
        behind > hour - Duration::from_secs(5) && end.state().contains("clock_behind_sec=359"),
        "{behind:?}"
    );
    rotate(&mut end, 6);
    assert_eq!(end.device.behind(now().wall), None);

    let mut end = start(&key);
    let mut at = now();
    at.wall += hour + Duration::from_secs(1);
    end.device.handle_tick(at, &mut end.tray);
    assert_eq!(end.device.behind(now().wall), None);

    // One that is behind is called, and answers.
    let (mut a, mut b) = (start(&key), End::new(2));
    a.key = key;
    a.peer(&b, "allowed_ip=10.0.2.0/24\n");
    let to_a = format!("endpoint={}\nallowed_ip=10.0.1.0/24\n", a.address);
    b.peer(&a, &to_a);
    b.send(&packet("10.0.2.1", "10.0.1.1"));
    carry(&mut a, &mut b);
    assert_eq!(a.tray.packets.len(), 1);
}

#[test]
fn a_handshake_is_as_long_ago_as_it_is_whatever_the_clock_says() {
    let bench = Bench::new();
    let (a, mut later) = (&bench.a, now());
    let at = |moment| {
        let state = a.device.state(moment).to_string();
        let line = state.lines().find_map(|l| l.strip_prefix("last_handshake_time_sec=").map(str::to_owned));
        line.unwrap().parse::<u64>().unwrap()
    };
    let first = at(later);
    assert!(later.wall.as_secs().abs_diff(first) <= 2);
    // Ten seconds pass, and somebody sets the clock back by an hour.
    later.now += Duration::from_secs(10);
    later.wall -= Duration::from_secs(3600 - 10);
    assert!(at(later).abs_diff(first - 3600) <= 1);
}
