//! Two devices on a wire made of vectors.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod wire;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use tombolo_wireguard::device::{Device, Drops, TICK};
use tombolo_wireguard::key::{PresharedKey, PrivateKey};
use tombolo_wireguard::uapi::{Request, parse_request, parse_state};
use wire::{End, carry, now, packet};

/// A calls B; B does not know where A is.
fn pair() -> (End, End) {
    let (mut a, mut b) = (End::new(1), End::new(2));
    let endpoint = format!("endpoint={}\nallowed_ip=10.0.2.0/24\nallowed_ip=fd02::/64\n", b.address);
    a.peer(&b, &endpoint);
    b.peer(&a, "allowed_ip=10.0.1.0/24\nallowed_ip=fd01::/64\n");
    (a, b)
}

#[test]
fn packets_that_wait_for_the_handshake_arrive_in_order() {
    let (mut a, mut b) = pair();
    let mut sent = Vec::new();
    for i in 1..=9 {
        sent.push(packet("10.0.1.1", &format!("10.0.2.{i}")));
        sent.push(packet("fd01::1", &format!("fd02::{i}")));
    }
    sent.iter().for_each(|p| a.send(p));
    assert_eq!(a.tray.datagrams.len(), 1, "one initiation");
    carry(&mut a, &mut b);
    assert_eq!(b.tray.packets, sent);
    assert_eq!((a.sessions(), b.sessions()), (1, 1));
    // Now B knows where A is.
    b.send(&packet("10.0.2.5", "10.0.1.1"));
    carry(&mut a, &mut b);
    assert_eq!(a.tray.packets.len(), 1);
    assert_eq!((a.device.drops(), b.device.drops()), (Drops::default(), Drops::default()));
}

#[test]
fn both_may_call_at_once() {
    let (mut a, mut b) = pair();
    let to_a = format!("endpoint={}\n", a.address);
    b.peer(&a, &to_a);
    a.send(&packet("10.0.1.1", "10.0.2.1"));
    b.send(&packet("10.0.2.1", "10.0.1.1"));
    carry(&mut a, &mut b);
    assert_eq!((a.tray.packets.len(), b.tray.packets.len()), (1, 1));
    for _ in 0..10 {
        a.send(&packet("10.0.1.1", "10.0.2.1"));
        b.send(&packet("10.0.2.1", "10.0.1.1"));
        carry(&mut a, &mut b);
    }
    assert_eq!((a.tray.packets.len(), b.tray.packets.len()), (11, 11));
}

#[test]
fn a_lost_first_call_is_made_anew_at_once_and_seldom() {
    let (mut a, _) = pair();
    a.send(&packet("10.0.1.1", "10.0.2.1"));
    a.tray.datagrams.clear();
    let mut calls = 0;
    // Five seconds: not one call is answered.
    for _ in 0..20 {
        a.device.handle_tick(now(), &mut a.tray);
        calls += a.tray.datagrams.drain(..).filter(|(_, d)| d.len() == 148).count();
    }
    assert_eq!(calls, 7);
    // Nobody answers a call twice, and once there are keys nobody calls.
    let (mut a, mut b) = pair();
    a.send(&packet("10.0.1.1", "10.0.2.1"));
    a.tray.datagrams.clear();
    a.device.handle_tick(now(), &mut a.tray);
    a.device.handle_tick(now(), &mut a.tray);
    carry(&mut a, &mut b);
    assert_eq!(b.tray.packets.len(), 1, "what waited came by the second call");
    for _ in 0..20 {
        a.device.handle_tick(now(), &mut a.tray);
        b.device.handle_tick(now(), &mut b.tray);
    }
    assert!(a.tray.datagrams.is_empty() && b.tray.datagrams.is_empty());
}

#[test]
fn timers_of_many_peers_are_looked_at_by_turns() {
    let mut a = End::new(1);
    assert_eq!(a.device.pause(), TICK);
    let keepalive = |n: u16| {
        let mut key = [7; 32];
        key[1..3].copy_from_slice(&n.to_le_bytes());
        let key = PrivateKey::new(key).unwrap();
        format!(
            "public_key={}\nendpoint=192.0.2.9:{}\npersistent_keepalive_interval=10\n",
            key.public().hex(),
            n + 1
        )
    };
    (0..1000).for_each(|n| a.set(&keepalive(n)));
    a.tray.datagrams.clear();
    let goes = 16;
    assert_eq!(a.device.pause() * goes, TICK);
    // A first call is made anew at the second look.
    for round in 1..=2 {
        let mut called = BTreeSet::new();
        for _ in 0..goes {
            a.device.handle_tick(now(), &mut a.tray);
            assert!(a.tray.datagrams.len() <= 63, "{}", a.tray.datagrams.len());
            called.extend(a.tray.datagrams.drain(..).map(|(to, _)| to.port()));
        }
        assert_eq!(called.len(), if round == 2 { 1000 } else { 0 });
    }
}

#[test]
fn a_source_that_is_not_the_peers_goes_nowhere() {
    let (mut a, mut b) = pair();
    a.send(&packet("10.0.9.9", "10.0.2.1"));
    a.send(&packet("10.0.2.1", "10.0.2.1"));
    a.send(&packet("fd02::1", "fd02::1"));
    carry(&mut a, &mut b);
    assert!(b.tray.packets.is_empty());
    assert_eq!(b.device.drops().source, 3);
    a.send(&packet("10.0.1.1", "10.0.7.7"));
    a.send(b"no packet");
    b.set("public_key=0900000000000000000000000000000000000000000000000000000000000000\nallowed_ip=10.0.8.0/24\n");
    b.send(&packet("10.0.2.1", "10.0.8.1"));
    assert_eq!(
        (a.device.drops().no_peer, a.device.drops().malformed, b.device.drops().no_endpoint),
        (1, 1, 1)
    );
}

#[test]
fn a_peer_that_moves_is_followed_and_noise_is_not() {
    let (mut a, mut b) = pair();
    a.send(&packet("10.0.1.1", "10.0.2.1"));
    carry(&mut a, &mut b);
    // Nonsense from elsewhere, and a copy of a real datagram changed in one bit.
    a.send(&packet("10.0.1.1", "10.0.2.2"));
    let (_, mut forged) = a.tray.datagrams.pop().unwrap();
    let genuine = forged.clone();
    *forged.last_mut().unwrap() ^= 1;
    let elsewhere: SocketAddr = "203.0.113.9:9".parse().unwrap();
    for datagram in [&b"nonsense"[..], &[], &forged, &[4, 0, 0, 0], &[1; 148]] {
        b.device.handle_datagram(elsewhere, datagram, now(), &mut b.tray);
    }
    assert_eq!(b.device.drops().refused, 5);
    assert!(b.state().contains("endpoint=192.0.2.1:51820"));
    b.device.handle_datagram(elsewhere, &genuine, now(), &mut b.tray);
    assert!(b.state().contains("endpoint=203.0.113.9:9"));
    // A replay from where it was does not bring it back.
    b.device.handle_datagram(a.address, &genuine, now(), &mut b.tray);
    assert!(b.state().contains("endpoint=203.0.113.9:9"));
    a.address = elsewhere;
    b.send(&packet("10.0.2.1", "10.0.1.1"));
    carry(&mut a, &mut b);
    assert_eq!(a.tray.packets.len(), 1);
}

#[test]
fn an_allowed_ip_has_one_owner_at_every_instant() {
    let (mut a, b) = pair();
    let c = End::new(3);
    a.peer(&c, "endpoint=192.0.2.3:51820\nallowed_ip=10.0.2.7/32\n");
    let owner = |end: &End, prefix: &str| {
        let state = end.state();
        let before = state.split(&format!("allowed_ip={prefix}\n")).next().unwrap().to_owned();
        assert_eq!(state.matches(&format!("allowed_ip={prefix}\n")).count(), 1, "{prefix}");
        before.lines().rev().find_map(|l| l.strip_prefix("public_key=").map(str::to_owned)).unwrap()
    };
    assert_eq!(owner(&a, "10.0.2.0/24"), b.key.public().hex());
    a.peer(&c, "allowed_ip=10.0.2.0/24\n");
    assert_eq!(owner(&a, "10.0.2.0/24"), c.key.public().hex());
    // Not its own any more: nothing to take away.
    a.peer(&b, "allowed_ip=-10.0.2.0/24\n");
    assert_eq!(owner(&a, "10.0.2.0/24"), c.key.public().hex());
    a.peer(&c, "allowed_ip=-10.0.2.0/24\n");
    assert!(!a.state().contains("10.0.2.0/24"));
    a.peer(&c, "replace_allowed_ips=true\nallowed_ip=10.3.0.0/16\n");
    assert!(!a.state().contains("10.0.2.7/32"));
    a.peer(&c, "remove=true\n");
    assert!(!a.state().contains("10.3.0.0/16") && a.state().contains("fd02::/64"));
    a.peer(&c, "update_only=true\nallowed_ip=10.3.0.0/16\n");
    assert!(!a.state().contains("10.3.0.0/16"));
    a.set("replace_peers=true\n");
    assert!(!a.state().contains("public_key"));
}

#[test]
fn setting_the_same_again_disturbs_nothing() {
    let (mut a, mut b) = pair();
    a.send(&packet("10.0.1.1", "10.0.2.1"));
    carry(&mut a, &mut b);
    let again: String = a
        .state()
        .lines()
        .filter(|l| !l.contains("handshake") && !l.contains("_bytes"))
        .fold(String::new(), |text, line| text + line + "\n");
    a.set(&again);
    a.send(&packet("10.0.1.1", "10.0.2.2"));
    assert_eq!(a.tray.datagrams[0].1[0], 4, "data at once, no handshake");
    carry(&mut a, &mut b);
    assert_eq!(b.tray.packets.len(), 2);
}

#[test]
fn other_keys_need_a_new_handshake() {
    let (mut a, mut b) = pair();
    a.send(&packet("10.0.1.1", "10.0.2.1"));
    carry(&mut a, &mut b);
    // A preshared key on both sides: called at once.
    let psk = format!("preshared_key={}\n", *PresharedKey::new([7; 32]).unwrap().hex());
    b.peer(&a, &psk);
    a.peer(&b, &psk);
    carry(&mut a, &mut b);
    a.send(&packet("10.0.1.1", "10.0.2.2"));
    carry(&mut a, &mut b);
    assert_eq!(b.tray.packets.len(), 2);
    // A private key nobody knows: nothing arrives.
    a.set(&format!("private_key={}\n", *PrivateKey::new([9; 32]).unwrap().hex()));
    a.send(&packet("10.0.1.1", "10.0.2.3"));
    carry(&mut a, &mut b);
    assert_eq!(b.tray.packets.len(), 2);
    // One's own key is no peer.
    a.peer(&b, "");
    a.set(&format!("private_key={}\n", *b.key.hex()));
    assert!(!a.state().contains("public_key"));
    // No key at all.
    a.set(&format!("private_key={}\n", "0".repeat(64)));
    assert!(!a.device.has_key() && !a.state().contains("private_key"));
}

#[test]
fn a_device_that_died_goes_on_from_its_state_and_calls() {
    let (mut a, mut b) = pair();
    a.send(&packet("10.0.1.1", "10.0.2.1"));
    carry(&mut a, &mut b);
    let state = b.state();
    b.device = Device::new(77);
    b.device.resume(parse_state(&state).unwrap_or_else(|e| panic!("{e}")), now(), &mut b.tray);
    assert_eq!(b.state(), {
        // Only the initiation it sends is new.
        let tx = state.lines().find(|l| l.starts_with("tx_bytes=")).unwrap();
        let sum: u64 = tx["tx_bytes=".len()..].parse::<u64>().unwrap() + 148;
        state.replace(tx, &format!("tx_bytes={sum}"))
    });
    assert_eq!(b.tray.datagrams.len(), 1);
    carry(&mut a, &mut b);
    a.send(&packet("10.0.1.1", "10.0.2.2"));
    b.send(&packet("10.0.2.1", "10.0.1.2"));
    carry(&mut a, &mut b);
    assert_eq!((a.tray.packets.len(), b.tray.packets.len()), (1, 2));
}

#[test]
fn a_keepalive_calls_at_once_and_then_at_its_interval() {
    let (mut a, mut b) = pair();
    a.peer(&b, "persistent_keepalive_interval=25\n");
    assert_eq!(a.tray.datagrams.len(), 1);
    carry(&mut a, &mut b);
    assert_eq!((a.sessions(), b.sessions()), (1, 1));
    let mut at = now();
    a.device.handle_tick(at, &mut a.tray);
    assert!(a.tray.datagrams.is_empty());
    at.now += Duration::from_secs(26);
    a.device.handle_tick(at, &mut a.tray);
    assert_eq!(a.tray.datagrams.pop().map(|(_, d)| d.len()), Some(32));
    a.device.handle_tick(at, &mut a.tray);
    assert!(a.tray.datagrams.is_empty());
}

#[test]
fn more_peers_than_there_is_room_for_are_refused_before_anything_changes() {
    let (a, _) = pair();
    let mut text = String::from("set=1\n");
    for i in 0..=65536u32 {
        text += &format!("public_key={i:064x}\n");
    }
    let Ok(Request::Set(set)) = parse_request(&text) else { panic!() };
    assert!(a.device.check(&set).is_err());
}
