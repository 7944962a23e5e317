//! The seam to the noise engine: all that knows boringtun.
//!
//! A [`Session`] is one peer's handshakes and keys. Messages go in, many at a time, and what comes out is made in the
//! room of a [`Sink`], one behind the other: an engine that seals and opens several at once can take this one's place.
//!
//! What boringtun leaves to its caller, and is done here: the queue is drained when a handshake completes; an
//! expired tunnel is revived by [`Session::initiate`]; keepalives are the caller's, since boringtun cannot change
//! their interval; the peer's index has 24 bits; buffers are large enough for every message.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};

use crate::key::{PresharedKey, PrivateKey, PublicKey};
use crate::segment::Packets;

/// The longest message that can be opened or sealed, with room for header, tag and a handshake.
pub const BUFFER: usize = 65536 + 256;

/// REKEY_AFTER_TIME of the WireGuard paper.
const REKEY_AFTER: Duration = Duration::from_secs(120);

/// Bits of a receiver index that boringtun counts sessions with.
const SESSION_BITS: u32 = 8;
/// First byte of a call (WireGuard paper, 5.4.2).
pub const INITIATION: u8 = 1;

/// First byte of a data message (5.4.6), and its length without payload.
const DATA: u8 = 4;
const OVERHEAD: usize = 32;

/// The longest message of a handshake.
const HANDSHAKE: usize = 148;

/// The length of a message with a cookie.
pub const COOKIE: usize = 64;

/// The receiver's index in a message that begins as a data message does.
fn receiver(datagram: &[u8]) -> Option<u32> {
    let (head, rest) = datagram.split_first_chunk::<4>()?;
    let index = rest.first_chunk().filter(|_| datagram.len() >= OVERHEAD && *head == [DATA, 0, 0, 0])?;
    Some(u32::from_le_bytes(*index))
}

/// The index of the session that a data message is for, and how many bytes of a train of messages of `size` bytes each
/// are for the same receiver.
pub fn data_run(train: &[u8], size: usize) -> Option<(u32, usize)> {
    let size = size.max(1);
    let first = receiver(train.get(..size).unwrap_or(train))?;
    let same = train.chunks(size).take_while(|datagram| receiver(datagram) == Some(first)).count();
    Some((first >> SESSION_BITS, (same * size).min(train.len())))
}

/// Where messages go that a session makes: into room that is there already, so that none is moved again.
pub trait Sink {
    /// Room for a message for the peer, of so many bytes or more. The same until [`Self::send`].
    fn message(&mut self, length: usize) -> &mut [u8];
    /// The first so many bytes of that room are a message.
    fn send(&mut self, length: usize);
    /// Room for a packet from the peer, of so many bytes or more. The same until [`Self::deliver`].
    fn packet(&mut self, length: usize) -> &mut [u8];
    /// The first so many bytes of that room are a packet the peer sent through the tunnel; its source is not checked
    /// yet.
    fn deliver(&mut self, length: usize);
}

/// Our identity: what every handshake message is first judged by.
pub struct Identity {
    private: PrivateKey,
    public: PublicKey,
    /// Checks messages, and asks for no cookie.
    calm: RateLimiter,
    /// Asks for a cookie always.
    strict: RateLimiter,
    /// For the sessions, which would ask a second time.
    open: Arc<RateLimiter>,
}

/// A message that is no data, and whom it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addressee {
    /// A handshake initiation; whose, [`Identity::caller`] finds out.
    Initiation,
    /// An answer to a handshake of the session with this index.
    Response(u32),
    /// A cookie for the session with this index.
    Cookie(u32),
}

/// Whether a sender has the address that it writes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// It has.
    Given,
    /// It must show a cookie, which was made in the room: so many bytes, to be sent to it.
    Wanted(usize),
}

impl Identity {
    /// An identity by its private key.
    pub fn new(private: PrivateKey) -> Self {
        let public = private.public();
        let limiter = |limit| RateLimiter::new(&public.noise(), limit);
        Self {
            calm: limiter(u64::MAX),
            strict: limiter(0),
            open: Arc::new(limiter(u64::MAX)),
            private,
            public,
        }
    }

    /// The private key.
    pub fn private(&self) -> &PrivateKey {
        &self.private
    }

    /// The public key.
    pub fn public(&self) -> PublicKey {
        self.public
    }

    /// Reads whom a datagram that is no data is for, if its sender knows our public key; it costs next to nothing.
    pub fn read(&self, datagram: &[u8]) -> Option<Addressee> {
        match self.calm.verify_packet(None, datagram, &mut [0; COOKIE]).ok()? {
            Packet::HandshakeInit(_) => Some(Addressee::Initiation),
            Packet::HandshakeResponse(p) => Some(Addressee::Response(p.receiver_idx >> SESSION_BITS)),
            Packet::PacketCookieReply(p) => Some(Addressee::Cookie(p.receiver_idx >> SESSION_BITS)),
            // It comes another way ([`data_run`]).
            Packet::PacketData(_) => None,
        }
    }

    /// Looks for a cookie of ours in a handshake message, and makes one in the room ([`COOKIE`] bytes) if there is
    /// none. `None` if it is no such message.
    pub fn prove(&self, from: IpAddr, datagram: &[u8], room: &mut [u8]) -> Option<Proof> {
        match self.strict.verify_packet(Some(from), datagram, room) {
            Ok(_) => Some(Proof::Given),
            Err(TunnResult::WriteToNetwork(cookie)) => Some(Proof::Wanted(cookie.len())),
            Err(_) => None,
        }
    }

    /// Whose initiation it is: a tenth of a millisecond of work.
    pub fn caller(&self, datagram: &[u8]) -> Option<PublicKey> {
        let Ok(Packet::HandshakeInit(init)) = Tunn::parse_incoming_packet(datagram) else { return None };
        let half = parse_handshake_anon(&self.private.secret(), &self.public.noise(), &init).ok()?;
        Some(PublicKey::new(half.peer_static_public))
    }
}

/// What opening messages showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Opened {
    /// So many bytes came from the peer: their address is the peer's.
    pub bytes: u64,
    /// So many messages did not.
    pub refused: u64,
    /// A handshake was completed.
    pub handshake: bool,
}

/// What a tick showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tick {
    /// All is well, or nothing is to be done.
    Fine,
    /// Handshakes went unanswered for 90 s, or nothing was sent for long: asleep until there is something to send,
    /// the peer calls, or [`Session::initiate`].
    Expired,
}

/// One peer's handshakes and keys.
pub struct Session {
    tunn: Box<Tunn>,
    /// The index of a session we answered, until the peer proves by data that it has it.
    unconfirmed: Option<u32>,
    /// Whether the keys in use come from a call of ours.
    called: bool,
    /// Ticks since the first call for the first keys, until there are some.
    calling: Option<u8>,
}

/// Ticks after which a call for the *first* keys is made anew. The protocol repeats a call after 5 s (REKEY_TIMEOUT);
/// where one packet in five is lost, every third handshake needs that, and until then nothing passes. Peers take fifty
/// calls a second. An answer may take until the call after the next.
const EARLY: [u8; 7] = [2, 4, 6, 9, 12, 15, 18];

impl Session {
    /// A session that has not begun. `index` (24 bits) comes back in [`Addressee`].
    pub fn new(identity: &Identity, peer: &PublicKey, preshared: Option<&PresharedKey>, index: u32) -> Self {
        let index = index & 0x00ff_ffff;
        let limiter = Some(Arc::clone(&identity.open));
        let preshared = preshared.map(PresharedKey::bytes);
        let tunn = Tunn::new(identity.private.secret(), peer.noise(), preshared, None, index, limiter);
        Self { tunn: Box::new(tunn), unconfirmed: None, called: false, calling: None }
    }

    /// Sends packets to the peer. Without a session the engine queues them (256 at most) and calls the peer. An
    /// empty packet is a keepalive.
    pub fn seal(&mut self, packets: &mut impl Packets, sink: &mut impl Sink) {
        while let Some(packet) = packets.next() {
            let needed = (packet.len() + OVERHEAD).max(HANDSHAKE);
            let room = sink.message(needed);
            if room.len() < needed {
                continue;
            }
            if let TunnResult::WriteToNetwork(message) = self.tunn.encapsulate(packet, room) {
                let (length, first) = (message.len(), message.first().copied());
                self.calling = self.calling.or((first == Some(INITIATION)).then_some(0));
                sink.send(length);
            }
        }
    }

    /// Takes a handshake message from the network that [`Identity::read`] gave to this session.
    pub fn open(&mut self, from: IpAddr, datagram: &[u8], to: Addressee, sink: &mut impl Sink) -> Opened {
        let mut room = [0; HANDSHAKE];
        let bytes = datagram.len() as u64;
        let message = match self.tunn.decapsulate(Some(from), datagram, &mut room) {
            TunnResult::WriteToNetwork(message) => message,
            TunnResult::Done => return Opened { bytes, ..Opened::default() },
            other => {
                tracing::trace!(?other, "message refused");
                return Opened { refused: 1, ..Opened::default() };
            }
        };
        let to_sink = sink.message(HANDSHAKE);
        if let Some(to_sink) = to_sink.get_mut(..message.len()) {
            to_sink.copy_from_slice(message);
            sink.send(message.len());
        }
        let handshake = matches!(to, Addressee::Response(_));
        if handshake {
            self.called = true;
            self.send_queue(sink);
        } else {
            self.unconfirmed = message.get(4..8).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
        }
        Opened { bytes, refused: 0, handshake }
    }

    /// Takes data messages that are all for this session, and for the same receiver.
    pub fn open_data<'d>(
        &mut self,
        datagrams: impl IntoIterator<Item = &'d [u8]>,
        sink: &mut impl Sink,
    ) -> Opened {
        let mut opened = Opened::default();
        for datagram in datagrams {
            let room = sink.packet(datagram.len());
            if room.len() < datagram.len() {
                opened.refused += 1;
                continue;
            }
            match self.tunn.decapsulate(None, datagram, room) {
                TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                    let length = packet.len();
                    sink.deliver(length);
                }
                // A keepalive.
                TunnResult::Done => {}
                other => {
                    tracing::trace!(?other, "message refused");
                    opened.refused += 1;
                    continue;
                }
            }
            opened.bytes += datagram.len() as u64;
            // Only now: before the peer has proved the new keys the queue would start a second handshake.
            if self.unconfirmed.is_some() && receiver(datagram) == self.unconfirmed {
                self.unconfirmed = None;
                self.called = false;
                opened.handshake = true;
                self.send_queue(sink);
            }
        }
        opened
    }

    /// Sends what waited for a handshake.
    fn send_queue(&mut self, sink: &mut impl Sink) {
        loop {
            let room = sink.message(BUFFER);
            if room.len() < BUFFER {
                return;
            }
            let TunnResult::WriteToNetwork(message) = self.tunn.decapsulate(None, &[], room) else { return };
            let length = message.len();
            sink.send(length);
        }
    }

    /// Calls the peer, unless a call is under way.
    pub fn initiate(&mut self, sink: &mut impl Sink) {
        if self.make(sink, |tunn, room| tunn.format_handshake_initiation(room, false)).is_ok_and(|made| made)
        {
            self.calling = self.calling.or(Some(0));
        }
    }

    /// Makes a short message in the sink's room. True if there was one to make.
    fn make(
        &mut self,
        sink: &mut impl Sink,
        make: impl for<'r> FnOnce(&mut Tunn, &'r mut [u8]) -> TunnResult<'r>,
    ) -> Result<bool, WireGuardError> {
        let room = sink.message(HANDSHAKE);
        if room.len() < HANDSHAKE {
            return Ok(false);
        }
        let length = match make(&mut self.tunn, room) {
            TunnResult::WriteToNetwork(message) => message.len(),
            TunnResult::Err(error) => return Err(error),
            _ => return Ok(false),
        };
        sink.send(length);
        Ok(true)
    }

    /// Repeats a call for the first keys that is not answered.
    fn call_again(&mut self, sink: &mut impl Sink) {
        // That the peer called too, and may not have heard our answer, is not enough.
        if self.is_established() && self.unconfirmed.is_none() {
            self.calling = None;
        }
        let Some(ticks) = &mut self.calling else { return };
        *ticks = ticks.saturating_add(1);
        if EARLY.contains(ticks) {
            // What it cannot do it says at the next tick.
            let _ = self.make(sink, |tunn, room| tunn.format_handshake_initiation(room, true));
        }
    }

    /// Whether there are keys to send with.
    pub fn is_established(&self) -> bool {
        self.tunn.time_since_last_handshake().is_some()
    }

    /// Whether keys are due that the engine does not see to: it renews them (REKEY_AFTER_TIME, by the one who called)
    /// only for packets, not for keepalives.
    pub fn is_stale(&self) -> bool {
        self.called && self.tunn.time_since_last_handshake().is_some_and(|age| age >= REKEY_AFTER)
    }

    /// Retransmission, rekeying, passive keepalive, expiry; to be called each 250 ms.
    pub fn handle_tick(&mut self, sink: &mut impl Sink) -> Tick {
        self.call_again(sink);
        match self.make(sink, Tunn::update_timers) {
            Err(WireGuardError::ConnectionExpired) => {
                self.calling = None;
                Tick::Expired
            }
            _ => Tick::Fine,
        }
    }
}
