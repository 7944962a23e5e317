//! Mangled bytes for everything that reads from outside: nothing may panic, everything read must lie
//! within its bounds and read back the same, and nothing mangled may be believed.
//!
//! Short by default. `TOMBOLO_FUZZ_SECONDS=600 cargo test -p tombolo-proto --test fuzz` runs longer, from another
//! seed each time; `TOMBOLO_FUZZ_SEED` repeats a run. Inputs start from valid documents of every kind and are altered
//! in ways that keep some structure (`.ci/fuzz` runs the same readers with coverage feedback): fields repeated, moved, grafted from others, lengths and numbers at their ends.

#![allow(clippy::print_stdout)]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use prost::Message as _;
use tombolo_proto::testing::*;
use tombolo_proto::trust::{Brokers, Context, Envelope, Membership, Revocations, RootChain};
use tombolo_proto::wire;

#[test]
fn fuzz() {
    let seconds =
        std::env::var("TOMBOLO_FUZZ_SECONDS").ok().map(|s| s.parse().expect("TOMBOLO_FUZZ_SECONDS"));
    let chosen = std::env::var("TOMBOLO_FUZZ_SEED").ok().map(|s| s.parse().expect("TOMBOLO_FUZZ_SEED"));
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |t| t.as_nanos() as u64);
    let seed: u64 = chosen.unwrap_or_else(|| if seconds.is_some() { clock() } else { 1 });
    println!("TOMBOLO_FUZZ_SEED={seed}");
    let started = Instant::now();
    let mut random = Random(seed | 1);
    let trusted = Trusted::new();
    let mut rounds = 0_u64;
    while match seconds {
        Some(seconds) => started.elapsed() < Duration::from_secs(seconds),
        None => rounds < 40,
    } {
        let corpus = corpus(&mut random);
        for _ in 0..500 {
            let bytes = random.mangle(&corpus);
            readers::check(&bytes);
            if random.below(8) == 0 {
                trusted.judge(&mut random, &bytes);
            }
        }
        rounds += 1;
    }
    println!("{} inputs", rounds * 500);
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 16) as usize % n.max(1)
    }

    fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }

    fn span(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        start..start + self.below((length - start).min(40) + 1)
    }

    fn mangle(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = self.pick(corpus).clone();
        for _ in 0..self.below(6) {
            let at = self.below(bytes.len());
            match self.below(9) {
                0 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
                1 if !bytes.is_empty() => bytes[at] = *self.pick(&[0, 1, 2, 0x0a, 0x12, 0x7f, 0x80, 0xff]),
                2 => bytes.truncate(at),
                3 => {
                    let span = self.span(bytes.len());
                    bytes.drain(span);
                }
                4 => {
                    // Fields repeated, up to and over the bounds of lists.
                    let span = self.span(bytes.len());
                    let piece = bytes[span.clone()].to_vec().repeat(*self.pick(&[1, 2, 9, 65, 300]));
                    bytes.splice(span.end..span.end, piece);
                }
                5 => {
                    // A field of another document, or a whole one inside another.
                    let other = self.pick(corpus);
                    let span = if self.below(2) == 0 { 0..other.len() } else { self.span(other.len()) };
                    bytes.splice(at..at, other[span].to_vec());
                }
                6 => {
                    let ends: &[&[u8]] = &[
                        &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1],
                        &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80],
                        &[0xff, 0xff, 3],
                        &[0x80, 0x80, 4],
                        &[0],
                    ];
                    let end = *self.pick(ends);
                    bytes.splice(at..at, end.iter().copied());
                }
                7 => {
                    // Lengths that fit: wrap all as a field.
                    let tag = (1 + self.below(8) as u8) << 3 | 2;
                    let mut wrapped = vec![tag];
                    prost::encoding::encode_varint(bytes.len() as u64, &mut wrapped);
                    wrapped.append(&mut bytes);
                    bytes = wrapped;
                }
                _ => bytes.extend((0..self.below(9)).map(|_| self.next() as u8).collect::<Vec<_>>()),
            }
            bytes.truncate(1 << 17);
        }
        bytes
    }
}

/// One valid encoding of each kind, others each time.
fn corpus(random: &mut Random) -> Vec<Vec<u8>> {
    let mut seed = [0; 32];
    seed.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&random.next().to_le_bytes()));
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let mut all = vec![
        wire::encode_roots(&one(&mut runner, any_roots())),
        wire::encode_grant(&one(&mut runner, any_grant())),
        wire::encode_binding(&one(&mut runner, any_binding())),
        wire::encode_statement(&one(&mut runner, any_statement())),
        wire::encode_revocations(&one(&mut runner, any_revocations())),
        wire::encode_brokers(&one(&mut runner, any_brokers())),
        wire::encode_endpoint(&one(&mut runner, any_endpoint())),
        wire::encode_export(&one(&mut runner, any_export())),
        wire::encode_backends(&one(&mut runner, any_backends())),
        wire::encode_envelope(&one(&mut runner, any_envelope())).encode_to_vec(),
        wire::encode_documents(&one(&mut runner, any_documents())).encode_to_vec(),
    ];
    for _ in 0..4 {
        all.push(wire::encode_message(&one(&mut runner, any_message())).encode_to_vec());
    }
    all
}

fn one<S: Strategy>(runner: &mut TestRunner, strategy: S) -> S::Value {
    strategy.new_tree(runner).expect("a strategy without a value").current()
}

/// Who judges signatures. Mangled documents are never believed.
struct Trusted {
    roots: RootChain,
    membership: Membership,
    documents: Vec<Envelope>,
}

impl Trusted {
    fn new() -> Self {
        let (root, roots) = set();
        let (membership, speaks) = membership("oslo", 1, &["10.1.0.0/16"]);
        let said = statement(&membership, 1, 1, tombolo_proto::trust::Digest([1; 32]), &speaks);
        let list = Revocations { set: roots.set(), version: 1, up_to: Default::default() };
        let brokers = Brokers { set: roots.set(), version: 1, brokers: Vec::new() };
        let documents = vec![
            first_roots().sign(&root),
            membership.grant().envelope().clone(),
            membership.bindings()[0].envelope().clone(),
            said,
            list.sign(&root),
            brokers.sign(&root),
        ];
        Self { roots, membership, documents }
    }

    fn judge(&self, random: &mut Random, bytes: &[u8]) {
        // The bytes as payload under a signature that fits something else.
        let donor = random.pick(&self.documents);
        let context = *random.pick(&CONTEXTS);
        let forged = Envelope { context, payload: bytes.into(), signature: donor.signature };
        if context != donor.context || bytes != &*donor.payload {
            self.refuse(&forged);
        }
        // A real document, mangled in transit.
        let mut real = donor.clone();
        let mangled = random.mangle(&[real.payload.to_vec()]);
        if mangled != *real.payload {
            real.payload = mangled.into();
            self.refuse(&real);
        }
    }

    fn refuse(&self, envelope: &Envelope) {
        assert!(self.roots.grant(envelope).is_err());
        assert!(self.roots.revocations(envelope).is_err());
        assert!(self.roots.brokers(envelope).is_err());
        assert!(self.roots.clone().advance(envelope).is_err());
        assert!(self.membership.statement(envelope).is_err());
        let grant = self.membership.grant().envelope();
        assert!(Membership::verify(&self.roots, grant, std::slice::from_ref(envelope)).is_err());
        // Anybody can found a set of their own; it is another.
        if envelope.context == Context::Roots {
            assert!(RootChain::pinned(self.roots.set(), std::slice::from_ref(envelope)).is_err());
        }
    }
}
