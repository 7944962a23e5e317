//! Two devices on a wire made of vectors.

use std::net::{IpAddr, SocketAddr};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use tombolo_wireguard::device::{Device, Moment, Wire};
use tombolo_wireguard::key::PrivateKey;
use tombolo_wireguard::noise::BUFFER;
use tombolo_wireguard::uapi::{Request, parse_request};

pub(crate) struct Tray {
    pub(crate) datagrams: Vec<(SocketAddr, Vec<u8>)>,
    pub(crate) packets: Vec<Vec<u8>>,
    room: Vec<u8>,
}

impl Default for Tray {
    fn default() -> Self {
        Self { datagrams: Vec::new(), packets: Vec::new(), room: vec![0; BUFFER] }
    }
}

impl Wire for Tray {
    fn datagram(&mut self, _length: usize) -> &mut [u8] {
        &mut self.room
    }
    fn send(&mut self, to: SocketAddr, length: usize) {
        self.datagrams.push((to, self.room[..length].to_vec()));
    }
    fn packet(&mut self, _length: usize) -> &mut [u8] {
        &mut self.room
    }
    fn deliver(&mut self, length: usize) {
        self.packets.push(self.room[..length].to_vec());
    }
}

pub(crate) struct End {
    pub(crate) device: Device,
    pub(crate) tray: Tray,
    pub(crate) address: SocketAddr,
    pub(crate) key: PrivateKey,
}

impl End {
    pub(crate) fn new(seed: u8) -> Self {
        let key = PrivateKey::new([seed; 32]).unwrap();
        let mut end = Self {
            device: Device::new(seed),
            tray: Tray::default(),
            address: format!("192.0.2.{seed}:51820").parse().unwrap(),
            key: key.clone(),
        };
        end.set(&format!("private_key={}\n", *key.hex()));
        end
    }

    pub(crate) fn set(&mut self, text: &str) {
        let Ok(Request::Set(set)) = parse_request(&format!("set=1\n{text}")) else { panic!("{text}") };
        self.device.check(&set).unwrap();
        self.device.apply(set, now(), &mut self.tray);
    }

    pub(crate) fn peer(&mut self, other: &Self, with: &str) {
        self.set(&format!("public_key={}\n{with}", other.key.public().hex()));
    }

    pub(crate) fn send(&mut self, packet: &[u8]) {
        self.device.handle_packet(packet, now(), &mut self.tray);
    }

    pub(crate) fn state(&self) -> String {
        self.device.state(now()).to_string()
    }

    pub(crate) fn sessions(&self) -> usize {
        self.state()
            .lines()
            .filter(|l| l.starts_with("last_handshake_time_sec=") && !l.ends_with("=0"))
            .count()
    }
}

pub(crate) fn now() -> Moment {
    Moment { now: Instant::now(), wall: SystemTime::now().duration_since(UNIX_EPOCH).unwrap() }
}

/// Carries datagrams until there are none; by `lose` they may be lost.
pub(crate) fn carry(a: &mut End, b: &mut End) {
    for _ in 0..20 {
        let (from_a, from_b) = (std::mem::take(&mut a.tray.datagrams), std::mem::take(&mut b.tray.datagrams));
        if from_a.is_empty() && from_b.is_empty() {
            return;
        }
        for (to, datagram) in from_a {
            if to == b.address {
                b.device.handle_datagram(a.address, &datagram, now(), &mut b.tray);
            }
        }
        for (to, datagram) in from_b {
            if to == a.address {
                a.device.handle_datagram(b.address, &datagram, now(), &mut a.tray);
            }
        }
    }
    panic!("they never stop talking");
}

pub(crate) fn packet(source: &str, destination: &str) -> Vec<u8> {
    let mut packet = match (source.parse().unwrap(), destination.parse().unwrap()) {
        (IpAddr::V4(s), IpAddr::V4(d)) => {
            let mut p = vec![0x45, 0, 0, 24, 0, 0, 0, 0, 64, 17, 0, 0];
            p.extend(s.octets());
            p.extend(d.octets());
            p
        }
        (IpAddr::V6(s), IpAddr::V6(d)) => {
            let mut p = vec![0x60, 0, 0, 0, 0, 4, 17, 64];
            p.extend(s.octets());
            p.extend(d.octets());
            p
        }
        _ => panic!("one family"),
    };
    packet.extend(b"data");
    packet
}
