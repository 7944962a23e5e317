//! Packets and datagrams on their way through a device.

use std::net::{IpAddr, SocketAddr};

use super::{Device, Moment, Peer, Slot, Wire};
use crate::allowed::AllowedIps;
use crate::limiter::Verdict;
use crate::noise::{Addressee, COOKIE, INITIATION, Proof, Sink, data_run};
use crate::packet::Header;
use crate::segment::{Packets, Single};
use crate::stamp::Stamps;

impl Device {
    /// Packets of the host.
    pub fn handle_packets(&mut self, packets: &mut impl Packets, at: Moment, wire: &mut impl Wire) {
        let Some(first) = packets.next() else { return };
        let Ok(header) = Header::parse(first) else {
            self.drops.malformed += 1;
            return;
        };
        let Some(slot) = self.allowed.owner(header.destination) else {
            self.drops.no_peer += 1;
            return;
        };
        let first = &first[..header.length];
        let elders = self.peers[usize::from(slot)].as_ref().is_some_and(Peer::is_elders);
        if elders && wire.leave_packet(first) {
            while let Some(packet) = packets.next() {
                wire.leave_packet(packet);
            }
            return;
        }
        let mut first = Single::new(first);
        let sent = self.seal(slot, &mut first, at, wire) && self.seal(slot, packets, at, wire);
        self.drops.no_endpoint += u64::from(!sent);
    }

    /// A packet of the host.
    pub fn handle_packet(&mut self, packet: &[u8], at: Moment, wire: &mut impl Wire) {
        self.handle_packets(&mut Single::new(packet), at, wire);
    }

    /// A packet that the next worker leaves to this one, which has retired: sent by keys that are there, or not at all.
    pub fn handle_left(&mut self, packet: &[u8], at: Moment, wire: &mut impl Wire) {
        let owner = Header::parse(packet).ok().and_then(|header| self.allowed.owner(header.destination));
        let peer = owner.and_then(|slot| self.peers[usize::from(slot)].as_ref());
        if peer.is_some_and(|peer| peer.lines.carries()) {
            self.handle_packet(packet, at, wire);
        }
    }

    /// What is no packet came from the host.
    pub fn handle_malformed(&mut self) {
        self.drops.malformed += 1;
    }

    /// Datagrams from the network, of `size` bytes each, but for the last, which may be shorter.
    pub fn handle_datagrams(
        &mut self,
        from: SocketAddr,
        mut train: &[u8],
        size: usize,
        at: Moment,
        wire: &mut impl Wire,
    ) {
        while !train.is_empty() {
            let (taken, refused) = match data_run(train, size) {
                Some((index, length)) => {
                    let run = train[..length].chunks(size.max(1));
                    let count = run.len() as u64;
                    let refused = self.open_data(from, index, run, at, wire).unwrap_or(count);
                    if refused == count && wire.has_elder() {
                        wire.leave_datagrams(from, &train[..length], size);
                    }
                    (length, refused)
                }
                None => {
                    let length = size.clamp(1, train.len());
                    let opened = self.open(from, &train[..length], at, wire);
                    (length, u64::from(opened.is_none()))
                }
            };
            self.drops.refused += refused;
            train = &train[taken..];
        }
    }

    /// A datagram from the network.
    pub fn handle_datagram(&mut self, from: SocketAddr, datagram: &[u8], at: Moment, wire: &mut impl Wire) {
        self.drops.refused += u64::from(datagram.is_empty());
        self.handle_datagrams(from, datagram, datagram.len(), at, wire);
    }

    /// A message that is no data.
    fn open(&mut self, from: SocketAddr, datagram: &[u8], at: Moment, wire: &mut impl Wire) -> Option<()> {
        let (own, to) = self.identities.read(datagram)?;
        // An answer is work only while we call, and to whoever knows our index.
        if to == Addressee::Initiation {
            match self.limiter.handle_message(from.ip(), at.now) {
                Verdict::Take => {}
                Verdict::Prove => match own.prove(from.ip(), datagram, wire.datagram(COOKIE))? {
                    Proof::Given => self.limiter.admit(from.ip(), at.now).then_some(())?,
                    Proof::Wanted(length) => {
                        wire.send(from, length);
                        return Some(());
                    }
                },
                Verdict::Drop => return None,
            }
        }
        let (slot, place) = match to {
            Addressee::Initiation => {
                let slot = *self.by_key.get(&own.caller(datagram)?)?;
                let own = own.public();
                (slot, self.add_line(slot, Some(&own))?)
            }
            Addressee::Response(index) | Addressee::Cookie(index) => self.find(index)?,
        };
        let peer = self.peers.get_mut(usize::from(slot))?.as_mut()?;
        let line = peer.lines.get(place)?;
        let mut out = Out::new(wire, &self.allowed, slot, Some(from));
        let opened = line.session.open(from.ip(), datagram, to, &mut out);
        out.account(peer, place, &mut self.stamps, at);
        // A cookie is for the handshake alone; it proves nothing about where the peer is.
        if opened.refused == 0 && !matches!(to, Addressee::Cookie(_)) {
            self.changed |= peer.handle_opened(opened, place, from, at);
        }
        (opened.refused == 0 || matches!(to, Addressee::Cookie(_))).then_some(())
    }

    /// Data for one receiver. Says how many messages were refused.
    fn open_data<'d>(
        &mut self,
        from: SocketAddr,
        index: u32,
        datagrams: impl Iterator<Item = &'d [u8]>,
        at: Moment,
        wire: &mut impl Wire,
    ) -> Option<u64> {
        let (slot, place) = self.find(index)?;
        let peer = self.peers.get_mut(usize::from(slot))?.as_mut()?;
        let line = peer.lines.get(place)?;
        let mut out = Out::new(wire, &self.allowed, slot, Some(from));
        let opened = line.session.open_data(datagrams, &mut out);
        self.drops.source += out.foreign;
        out.account(peer, place, &mut self.stamps, at);
        if opened.bytes > 0 {
            self.changed |= peer.handle_opened(opened, place, from, at);
        }
        Some(opened.refused)
    }

    /// The peer and the line that messages with this index are for.
    fn find(&self, index: u32) -> Option<(Slot, usize)> {
        let (slot, generation) = (index as Slot, (index >> 16) as u8);
        Some((slot, self.peers.get(usize::from(slot))?.as_ref()?.lines.of(generation)?))
    }

    pub(super) fn seal(
        &mut self,
        slot: Slot,
        packets: &mut impl Packets,
        at: Moment,
        wire: &mut impl Wire,
    ) -> bool {
        let Some(peer) = self.peers[usize::from(slot)].as_mut() else { return false };
        let (Some((place, line)), Some(endpoint)) = (peer.lines.sending(), peer.endpoint) else {
            return false;
        };
        let mut out = Out::new(wire, &self.allowed, slot, Some(endpoint));
        line.session.seal(packets, &mut out);
        out.account(peer, place, &mut self.stamps, at);
        peer.last_traffic = at.now;
        true
    }
}

/// Where a session's messages go.
pub(super) struct Out<'a, W> {
    wire: &'a mut W,
    allowed: &'a AllowedIps<Slot>,
    slot: Slot,
    to: Option<SocketAddr>,
    sent: u64,
    foreign: u64,
    called: bool,
    /// The last source that the peer was found to own.
    proved: Option<IpAddr>,
}

impl<'a, W> Out<'a, W> {
    pub(super) fn new(
        wire: &'a mut W,
        allowed: &'a AllowedIps<Slot>,
        slot: Slot,
        to: Option<SocketAddr>,
    ) -> Self {
        Self { wire, allowed, slot, to, sent: 0, foreign: 0, called: false, proved: None }
    }

    /// Writes down what went out by the peer's line at `place`.
    pub(super) fn account(self, peer: &mut Peer, place: usize, stamps: &mut Stamps, at: Moment) {
        peer.past.tx_bytes += self.sent;
        if self.sent > 0 {
            peer.last_traffic = at.now;
        }
        if let Some(own) = peer.lines.own(place).filter(|_| self.called) {
            stamps.note(own, at);
        }
    }

    fn may_use(&mut self, source: IpAddr) -> bool {
        if self.proved != Some(source) {
            self.proved = Some(source).filter(|source| self.allowed.owner(*source) == Some(self.slot));
        }
        self.proved.is_some()
    }
}

impl<W: Wire> Sink for Out<'_, W> {
    fn message(&mut self, length: usize) -> &mut [u8] {
        self.wire.datagram(length)
    }

    fn send(&mut self, length: usize) {
        if let Some(to) = self.to {
            self.called |= self.wire.datagram(length).first() == Some(&INITIATION);
            self.wire.send(to, length);
            self.sent += length as u64;
        }
    }

    fn packet(&mut self, length: usize) -> &mut [u8] {
        self.wire.packet(length)
    }

    fn deliver(&mut self, length: usize) {
        let header = self.wire.packet(length).get(..length).map(Header::parse);
        match header {
            Some(Ok(header)) if self.may_use(header.source) => self.wire.deliver(header.length),
            _ => self.foreign += 1,
        }
    }
}
