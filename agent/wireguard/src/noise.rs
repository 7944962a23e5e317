//! The seam to the noise engine: all that knows boringtun.
//!
//! A [`Session`] is one peer's handshakes and keys. Messages go in, possibly several, and what comes out goes to a
//! [`Sink`], so that an engine that seals and opens in batches can take this one's place.
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

/// The longest message that can be opened or sealed, with room for header, tag and a handshake.
pub const BUFFER: usize = 65536 + 256;

/// Handshake messages a second, over all peers, from which on senders must prove their address by a cookie.
const HANDSHAKES_A_SECOND: u64 = 500;

/// REKEY_AFTER_TIME of the WireGuard paper.
const REKEY_AFTER: Duration = Duration::from_secs(120);

/// Bits of a receiver index that boringtun counts sessions with.
const SESSION_BITS: u32 = 8;
/// First byte of a call (WireGuard paper, 5.4.2).
const INITIATION: u8 = 1;

/// Where messages go that a session makes.
pub trait Sink {
    /// A message for the peer.
    fn network(&mut self, datagram: &[u8]);
    /// A packet the peer sent through the tunnel; its source is not checked yet.
    fn tunnel(&mut self, packet: &[u8]);
}

/// Room for one message. Kept by the caller, since it is large.
pub struct Scratch(Box<[u8]>);

impl Scratch {
    /// Room for any message.
    pub fn new() -> Self {
        Self(vec![0; BUFFER].into_boxed_slice())
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Our identity: what every message that arrives is first judged by.
pub struct Identity {
    private: PrivateKey,
    public: PublicKey,
    /// Counts and limits handshakes.
    gate: RateLimiter,
    /// For the sessions, which would count a second time: without limit.
    open: Arc<RateLimiter>,
}

/// Whom a message is for, and what it is.
#[derive(Debug, PartialEq, Eq)]
pub enum Addressee {
    /// A handshake initiation by this key.
    Initiation(PublicKey),
    /// An answer to a handshake of the session with this index.
    Response(u32),
    /// A cookie for the session with this index.
    Cookie(u32),
    /// Data for the session with this index.
    Data(u32),
    /// The sender must first prove its address: send this many bytes of the scratch back.
    Challenge(usize),
}

impl Identity {
    /// An identity by its private key.
    pub fn new(private: PrivateKey) -> Self {
        let public = private.public();
        Self {
            gate: RateLimiter::new(&public.noise(), HANDSHAKES_A_SECOND),
            open: Arc::new(RateLimiter::new(&public.noise(), u64::MAX)),
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

    /// Reads whom a datagram is for; `None` if it is no WireGuard message for this identity.
    pub fn read(&self, from: IpAddr, datagram: &[u8], scratch: &mut Scratch) -> Option<Addressee> {
        match self.gate.verify_packet(Some(from), datagram, &mut scratch.0) {
            Ok(Packet::HandshakeInit(init)) => {
                let half = parse_handshake_anon(&self.private.secret(), &self.public.noise(), &init).ok()?;
                Some(Addressee::Initiation(PublicKey::new(half.peer_static_public)))
            }
            Ok(Packet::HandshakeResponse(p)) => Some(Addressee::Response(p.receiver_idx >> SESSION_BITS)),
            Ok(Packet::PacketCookieReply(p)) => Some(Addressee::Cookie(p.receiver_idx >> SESSION_BITS)),
            Ok(Packet::PacketData(p)) => Some(Addressee::Data(p.receiver_idx >> SESSION_BITS)),
            Err(TunnResult::WriteToNetwork(cookie)) => Some(Addressee::Challenge(cookie.len())),
            Err(_) => None,
        }
    }

    /// The answer that [`Addressee::Challenge`] speaks of.
    pub fn challenge(scratch: &Scratch, length: usize) -> &[u8] {
        &scratch.0[..length]
    }

    /// To be called about once a second.
    pub fn handle_second(&self) {
        self.gate.reset_count();
        self.open.reset_count();
    }
}

/// What opening a message showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Opened {
    /// It came from the peer: its address is the peer's, its bytes count.
    pub authentic: bool,
    /// It completed a handshake.
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
    pub fn seal<'p>(
        &mut self,
        packets: impl IntoIterator<Item = &'p [u8]>,
        scratch: &mut Scratch,
        sink: &mut impl Sink,
    ) {
        for packet in packets {
            if packet.len() + 64 > scratch.0.len() {
                continue;
            }
            if let TunnResult::WriteToNetwork(message) = self.tunn.encapsulate(packet, &mut scratch.0) {
                self.calling = self.calling.or((message.first() == Some(&INITIATION)).then_some(0));
                sink.network(message);
            }
        }
    }

    /// Takes a message from the network that [`Identity::read`] gave to this session.
    pub fn open(
        &mut self,
        from: IpAddr,
        datagram: &[u8],
        to: &Addressee,
        scratch: &mut Scratch,
        sink: &mut impl Sink,
    ) -> Opened {
        if datagram.len() > scratch.0.len() {
            return Opened::default();
        }
        let opened = match self.tunn.decapsulate(Some(from), datagram, &mut scratch.0) {
            TunnResult::Done => Opened { authentic: !matches!(to, Addressee::Cookie(_)), handshake: false },
            TunnResult::Err(error) => {
                tracing::trace!(?error, "message refused");
                return Opened::default();
            }
            TunnResult::WriteToNetwork(message) => {
                sink.network(message);
                match to {
                    Addressee::Initiation(_) => {
                        self.unconfirmed =
                            message.get(4..8).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
                        Opened { authentic: true, handshake: false }
                    }
                    _ => Opened { authentic: true, handshake: matches!(to, Addressee::Response(_)) },
                }
            }
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                sink.tunnel(packet);
                Opened { authentic: true, handshake: false }
            }
        };
        let confirmed = matches!(to, Addressee::Data(_))
            && self.unconfirmed.is_some()
            && datagram.get(4..8).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes) == self.unconfirmed;
        if confirmed {
            self.unconfirmed = None;
        }
        let opened = Opened { handshake: opened.handshake || confirmed, ..opened };
        // Only now: before the peer has proved the new keys the queue would start a second handshake.
        if opened.handshake {
            self.called = !confirmed;
            while let TunnResult::WriteToNetwork(message) = self.tunn.decapsulate(None, &[], &mut scratch.0) {
                sink.network(message);
            }
        }
        opened
    }

    /// Calls the peer, unless a call is under way.
    pub fn initiate(&mut self, scratch: &mut Scratch, sink: &mut impl Sink) {
        if let TunnResult::WriteToNetwork(message) =
            self.tunn.format_handshake_initiation(&mut scratch.0, false)
        {
            self.calling = self.calling.or(Some(0));
            sink.network(message);
        }
    }

    /// Repeats a call for the first keys that is not answered.
    fn call_again(&mut self, scratch: &mut Scratch, sink: &mut impl Sink) {
        // That the peer called too, and may not have heard our answer, is not enough.
        if self.is_established() && self.unconfirmed.is_none() {
            self.calling = None;
        }
        let Some(ticks) = &mut self.calling else { return };
        *ticks = ticks.saturating_add(1);
        if EARLY.contains(ticks)
            && let TunnResult::WriteToNetwork(message) =
                self.tunn.format_handshake_initiation(&mut scratch.0, true)
        {
            sink.network(message);
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
    pub fn handle_tick(&mut self, scratch: &mut Scratch, sink: &mut impl Sink) -> Tick {
        self.call_again(scratch, sink);
        match self.tunn.update_timers(&mut scratch.0) {
            TunnResult::WriteToNetwork(message) => {
                sink.network(message);
                Tick::Fine
            }
            TunnResult::Err(WireGuardError::ConnectionExpired) => {
                self.calling = None;
                Tick::Expired
            }
            _ => Tick::Fine,
        }
    }
}
