//! From the bytes of a query to the bytes of its answer: no socket, no clock.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use hickory_proto::op::LowerQuery;
use hickory_proto::rr::{DNSClass, RecordType};
use hickory_server::net::xfer::Protocol;
use hickory_server::server::Request;
use tombolo_agent_core::zone::{self, Answer, Data, Found, Kind, Target, Zone};

use super::Rcode;

/// How a query came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// One datagram.
    Udp,
    /// A stream.
    Tcp,
}

/// What goes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The message.
    pub bytes: Vec<u8>,
    /// Its code.
    pub rcode: Rcode,
}

/// Datagrams of this length pass everywhere unfragmented (DNS flag day 2020). Also what we say we can take.
const MAX_UDP: u16 = 1232;
/// Without EDNS (RFC 1035).
const MIN_UDP: u16 = 512;
const HEADER: usize = 12;
/// The OPT record of an answer.
const OPT: usize = 11;
/// Pointer to the question's name.
const ASKED: u16 = 0xc000 | HEADER as u16;
/// The shortest record with an address or a port.
const SHORTEST: usize = 16;
const QR: u16 = 0x8000;
const AA: u16 = 0x0400;
const TC: u16 = 0x0200;
/// Opcode, RD and CD go back as they came.
const ECHOED: u16 = 0x7910;

/// Answers one message, or not at all: what is no query (a reply, a fragment of a header, port 0) is met with
/// silence. `zone` is `None` while it is not known. `turn` rotates the order of records.
pub fn answer(zone: Option<&Zone>, query: &[u8], from: SocketAddr, over: Over, turn: u32) -> Option<Reply> {
    let word = |at: usize| Some(u16::from_be_bytes([*query.get(at)?, *query.get(at + 1)?]));
    let flags = word(2)?;
    let (questions, others) = (word(4)?, u32::from(word(6)?) + u32::from(word(8)?) + u32::from(word(10)?));
    // A reply to a reply would go back and forth for ever.
    if flags & QR != 0 || from.port() == 0 || from.ip().is_unspecified() {
        return None;
    }
    let head = Head { id: word(0)?, flags };
    if flags & 0x7800 != 0 {
        return Some(head.bare(Rcode::NotImp));
    }
    if questions != 1 || others > 8 {
        return Some(head.bare(Rcode::FormErr));
    }
    let protocol = match over {
        Over::Udp => Protocol::Udp,
        Over::Tcp => Protocol::Tcp,
    };
    let Ok(request) = Request::from_bytes(query.to_vec(), from, protocol) else {
        return Some(head.bare(Rcode::FormErr));
    };
    let [asked] = request.queries.queries() else { return Some(head.bare(Rcode::FormErr)) };
    let question = request.queries.as_bytes();
    // A pointer in a question can only point into the header.
    if question.len() != asked.name().iter().map(|label| label.len() + 1).sum::<usize>() + 5 {
        return Some(head.bare(Rcode::FormErr));
    }
    let edns = request.edns.as_ref().map(|edns| edns.flags().dnssec_ok);
    let limit = match (over, &request.edns) {
        (Over::Tcp, _) => usize::from(u16::MAX),
        (Over::Udp, Some(edns)) => usize::from(edns.max_payload().clamp(MIN_UDP, MAX_UDP)),
        (Over::Udp, None) => usize::from(MIN_UDP),
    };
    let mut message = Message::new(head, question, edns, limit);
    if request.edns.as_ref().is_some_and(|edns| edns.version() != 0) {
        return Some(message.finish(Rcode::BadVers));
    }
    let transfer = matches!(asked.query_type(), RecordType::AXFR | RecordType::IXFR);
    let labels = labels(asked);
    let (Some(labels), false, DNSClass::IN) = (labels, transfer, asked.query_class()) else {
        return Some(message.finish(Rcode::Refused));
    };
    let Some(zone) = zone else { return Some(message.finish(Rcode::ServFail)) };
    message.flags |= AA;
    let most = limit / SHORTEST;
    let rcode = match zone.answer(&labels, kind(asked.query_type()), turn, most) {
        Answer::Found(found) => {
            message.found(&found);
            Rcode::NoError
        }
        Answer::NoData => {
            message.denial();
            Rcode::NoError
        }
        Answer::NoName => {
            message.denial();
            Rcode::NxDomain
        }
    };
    Some(message.finish(rcode))
}

/// Labels before the apex; `None` if the name is not in the zone.
fn labels(asked: &LowerQuery) -> Option<Vec<&str>> {
    let mut labels: Vec<&[u8]> = asked.name().iter().collect();
    for apex in zone::APEX.rsplit('.') {
        if labels.pop()? != apex.as_bytes() {
            return None;
        }
    }
    // What is no text is no name of ours.
    Some(labels.into_iter().map(|label| std::str::from_utf8(label).unwrap_or("\u{fffd}")).collect())
}

fn kind(record: RecordType) -> Kind {
    match record {
        RecordType::A => Kind::A,
        RecordType::AAAA => Kind::Aaaa,
        RecordType::SRV => Kind::Srv,
        RecordType::TXT => Kind::Txt,
        RecordType::SOA => Kind::Soa,
        RecordType::NS => Kind::Ns,
        RecordType::ANY => Kind::Any,
        _ => Kind::Other,
    }
}

#[derive(Debug, Clone, Copy)]
struct Head {
    id: u16,
    flags: u16,
}

impl Head {
    /// An answer that repeats no question.
    fn bare(self, rcode: Rcode) -> Reply {
        Message::new(self, &[], None, usize::from(MIN_UDP)).finish(rcode)
    }
}

/// An answer while it is written. Every record is checked to fit, OPT included, before it stays.
struct Message {
    bytes: Vec<u8>,
    flags: u16,
    /// EDNS was spoken; with the DO bit or without.
    edns: Option<bool>,
    /// For all but OPT.
    limit: usize,
    questions: u16,
    answers: u16,
    authorities: u16,
    additionals: u16,
}

impl Message {
    fn new(head: Head, question: &[u8], edns: Option<bool>, limit: usize) -> Self {
        let mut bytes = Vec::with_capacity(MIN_UDP.into());
        bytes.extend(head.id.to_be_bytes());
        bytes.resize(HEADER, 0);
        bytes.extend(question);
        Self {
            bytes,
            flags: QR | head.flags & ECHOED,
            edns,
            limit: limit - if edns.is_some() { OPT } else { 0 },
            questions: u16::from(!question.is_empty()),
            answers: 0,
            authorities: 0,
            additionals: 0,
        }
    }

    fn found(&mut self, found: &Found<'_>) {
        let mut targets = BTreeMap::new();
        for record in &found.records {
            let start = self.bytes.len();
            self.u16(ASKED);
            self.data(record);
            if self.bytes.len() > self.limit {
                self.bytes.truncate(start);
                self.flags |= TC;
                return;
            }
            self.answers += 1;
            if let Data::Srv { target, .. } = record {
                // Owner, type, class, TTL, length, priority, weight, port.
                targets.entry(*target).or_insert(start + 18);
            }
        }
        if found.cut {
            self.flags |= TC;
            return;
        }
        // That additional records do not fit is no truncation (RFC 2181, 9).
        for (target, address) in &found.additional {
            let start = self.bytes.len();
            match targets.get(target).and_then(|at| u16::try_from(*at).ok()).filter(|at| *at < 0x4000) {
                Some(at) => self.u16(0xc000 | at),
                None => self.target(target),
            }
            match address {
                IpAddr::V4(a) => self.data(&Data::A(*a)),
                IpAddr::V6(a) => self.data(&Data::Aaaa(*a)),
            }
            if self.bytes.len() > self.limit {
                self.bytes.truncate(start);
                return;
            }
            self.additionals += 1;
        }
    }

    /// Type, class, TTL and content of a record.
    fn data(&mut self, data: &Data<'_>) {
        let code = match data {
            Data::A(_) => RecordType::A,
            Data::Aaaa(_) => RecordType::AAAA,
            Data::Srv { .. } => RecordType::SRV,
            Data::Txt(_) => RecordType::TXT,
            Data::Soa => RecordType::SOA,
            Data::Ns => RecordType::NS,
        };
        self.meta(code, data.ttl());
        let length = self.bytes.len();
        self.u16(0);
        match data {
            Data::A(address) => self.bytes.extend(address.octets()),
            Data::Aaaa(address) => self.bytes.extend(address.octets()),
            Data::Srv { port, target } => {
                // Priority and weight, then where: the name is never compressed (RFC 2782).
                [0, 100, *port].into_iter().for_each(|value| self.u16(value));
                self.target(target);
            }
            Data::Txt(text) => self.label(text),
            Data::Soa => self.soa(),
            Data::Ns => self.name(zone::NAME_SERVER),
        }
        self.length(length);
    }

    /// SOA in the authority section: how long a denial holds (RFC 2308).
    fn denial(&mut self) {
        let start = self.bytes.len();
        // The question ends with the apex.
        let apex = zone::APEX.len() + 2;
        let at = start - 4 - apex;
        self.u16(0xc000 | u16::try_from(at).unwrap_or(0));
        self.meta(RecordType::SOA, zone::TTL_DENIAL);
        let length = self.bytes.len();
        self.u16(0);
        self.soa();
        self.length(length);
        if self.bytes.len() > self.limit {
            self.bytes.truncate(start);
        } else {
            self.authorities += 1;
        }
    }

    fn soa(&mut self) {
        self.name(zone::NAME_SERVER);
        self.name(["hostmaster"]);
        // Nobody transfers the zone, so its serial says nothing: serial, refresh, retry, expire, minimum.
        for value in [1, 7200, 1800, 86400, zone::TTL_DENIAL] {
            self.u32(value);
        }
    }

    fn meta(&mut self, code: RecordType, ttl: u32) {
        self.u16(code.into());
        self.u16(DNSClass::IN.into());
        self.u32(ttl);
    }

    fn target(&mut self, target: &Target<'_>) {
        target.labels().for_each(|label| self.label(label));
        self.name([]);
    }

    /// Labels, then the apex.
    fn name<const N: usize>(&mut self, labels: [&str; N]) {
        labels.into_iter().chain(zone::APEX.split('.')).for_each(|label| self.label(label));
        self.bytes.push(0);
    }

    /// A label, or a TXT's string. All of ours are shorter than 64.
    fn label(&mut self, label: &str) {
        self.bytes.push(label.len() as u8);
        self.bytes.extend(label.as_bytes());
    }

    /// Fills in the length of what was written since.
    fn length(&mut self, at: usize) {
        let length = (self.bytes.len() - at - 2) as u16;
        self.put(at, length);
    }

    fn u16(&mut self, value: u16) {
        self.bytes.extend(value.to_be_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.bytes.extend(value.to_be_bytes());
    }

    fn put(&mut self, at: usize, value: u16) {
        if let Some(place) = self.bytes.get_mut(at..at + 2) {
            place.copy_from_slice(&value.to_be_bytes());
        }
    }

    fn finish(mut self, rcode: Rcode) -> Reply {
        let code = rcode as u16;
        if let Some(dnssec_ok) = self.edns {
            self.bytes.push(0);
            self.u16(RecordType::OPT.into());
            self.u16(MAX_UDP);
            // Upper bits of the code, version 0, DO as it came, no options.
            self.bytes.extend([(code >> 4) as u8, 0, if dnssec_ok { 0x80 } else { 0 }, 0, 0, 0]);
            self.additionals += 1;
        }
        let counts = [self.questions, self.answers, self.authorities, self.additionals];
        self.put(2, self.flags | code & 15);
        for (at, count) in (4..).step_by(2).zip(counts) {
            self.put(at, count);
        }
        Reply { bytes: self.bytes, rcode }
    }
}
