//! Handshakes that nobody wants, in great number.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[allow(dead_code, reason = "shared with other tests")]
mod wire;

use std::net::SocketAddr;
use std::time::Duration;

use tombolo_wireguard::device::Device;
use tombolo_wireguard::limiter::{CALM, PROOFS};
use tombolo_wireguard::uapi::parse_state;
use wire::{End, carry, now, packet};

fn pair() -> (End, End) {
    let (mut a, mut b) = (End::new(1), End::new(2));
    a.peer(&b, &format!("endpoint={}\nallowed_ip=10.0.2.0/24\n", b.address));
    b.peer(&a, "allowed_ip=10.0.1.0/24\n");
    a.send(&packet("10.0.1.1", "10.0.2.1"));
    carry(&mut a, &mut b);
    (a, b)
}

/// A call to `b` by a key it does not know.
fn call(b: &End) -> Vec<u8> {
    let mut stranger = End::new(9);
    stranger.peer(b, &format!("endpoint={}\nallowed_ip=0.0.0.0/0\n", b.address));
    stranger.send(&packet("10.0.9.1", "10.0.2.1"));
    stranger.tray.datagrams.pop().unwrap().1
}

#[test]
fn a_flood_costs_a_bounded_number_of_answers_and_no_packet() {
    for sources in [1, 1000, 60_000u32] {
        let (mut a, mut b) = pair();
        let call = call(&b);
        let start = now();
        let (mut answers, mut arrived) = (0, 0);
        // Half a second of 100,000 calls a second, and a packet for every fifty.
        for i in 0..50_000u32 {
            let mut at = start;
            at.now += Duration::from_micros(u64::from(i) * 10);
            let from = SocketAddr::from(((0x0a01_0000 + i % sources).to_be_bytes(), 7));
            b.device.handle_datagram(from, &call, at, &mut b.tray);
            answers += b.tray.datagrams.drain(..).filter(|(to, d)| *to == from && d.len() == 64).count();
            if i % 50 == 0 {
                a.send(&packet("10.0.1.1", "10.0.2.1"));
                for (_, datagram) in a.tray.datagrams.drain(..) {
                    b.device.handle_datagram(a.address, &datagram, at, &mut b.tray);
                }
                arrived += b.tray.packets.drain(..).filter(|p| p.len() == 24).count();
            }
        }
        // The first one came with the handshake.
        assert_eq!(arrived, 1000 + 1, "{sources} sources");
        assert_eq!(answers as u32, PROOFS, "{sources} sources");
        assert_eq!(b.device.drops().refused, u64::from(50_000 - PROOFS));
    }
}

#[test]
fn a_peer_gets_through_by_its_cookie() {
    let (mut a, mut b) = pair();
    let call = call(&b);
    let elsewhere = SocketAddr::from(([10, 1, 0, 1], 7));
    let flood = |b: &mut End| {
        for _ in 0..CALM + PROOFS + 10 {
            b.device.handle_datagram(elsewhere, &call, now(), &mut b.tray);
        }
        b.tray.datagrams.clear();
    };
    flood(&mut b);
    b.device.handle_tick(now(), &mut b.tray);
    // A has died, and calls anew.
    let state = a.state();
    a.device = Device::new(77);
    a.device.resume(parse_state(&state).unwrap_or_else(|e| panic!("{e}")), now(), &mut a.tray);
    assert_eq!(a.tray.datagrams.len(), 1);
    flood(&mut b);
    let (_, first) = a.tray.datagrams.pop().unwrap();
    b.device.handle_datagram(a.address, &first, now(), &mut b.tray);
    let (to, cookie) = b.tray.datagrams.pop().unwrap();
    assert_eq!((to, cookie.len()), (a.address, 64), "a cookie, though strangers' are used up");
    a.device.handle_datagram(b.address, &cookie, now(), &mut a.tray);
    // Its next call shows the cookie.
    while a.tray.datagrams.is_empty() {
        a.device.handle_tick(now(), &mut a.tray);
    }
    flood(&mut b);
    b.tray.packets.clear();
    carry(&mut a, &mut b);
    a.send(&packet("10.0.1.1", "10.0.2.2"));
    carry(&mut a, &mut b);
    assert_eq!((a.sessions(), b.tray.packets.len()), (1, 1));
}
