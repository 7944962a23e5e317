//! Writes inputs to start from: `seeds DIR` makes a directory of them for each target.

#[path = "../../proto/replica/tests/common/mod.rs"]
mod common;

use std::fs;
use std::path::{Path, PathBuf};

// It holds what the coverage counters call.
use libfuzzer_sys as _;

use common::{Link, Member, record, scope};
use proptest::strategy::{Strategy, ValueTree as _};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use prost::Message as _;
use tombolo_agent_core::hello::Hello;
use tombolo_proto::testing::*;
use tombolo_proto::wire;
use tombolo_replica::{Interest, Introduction, Replica};

include!("oslo.rs");

fn main() -> std::io::Result<()> {
    let dir = PathBuf::from(std::env::args_os().nth(1).expect("usage: seeds DIR"));
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[1; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let mut wires = Vec::new();
    for _ in 0..8 {
        let r = &mut runner;
        wires.extend([
            wire::encode_roots(&one(r, any_roots())),
            wire::encode_grant(&one(r, any_grant())),
            wire::encode_binding(&one(r, any_binding())),
            wire::encode_statement(&one(r, any_statement())),
            wire::encode_revocations(&one(r, any_revocations())),
            wire::encode_brokers(&one(r, any_brokers())),
            wire::encode_endpoint(&one(r, any_endpoint())),
            wire::encode_export(&one(r, any_export())),
            wire::encode_backends(&one(r, any_backends())),
            wire::encode_envelope(&one(r, any_envelope())).encode_to_vec(),
            wire::encode_documents(&one(r, any_documents())).encode_to_vec(),
            wire::encode_message(&one(r, any_message())).encode_to_vec(),
            wire::encode_message(&one(r, any_message())).encode_to_vec(),
        ]);
    }
    write(&dir, "wire", wires)?;
    write(&dir, "session", vec![session()])?;
    write(&dir, "hello", vec![Hello::default().encode(0)])?;
    write(&dir, "dns", ["web.shop", "db.shop", "a-rather-long-name-2.east.db.shop"].map(question).into())?;
    let key = "07".repeat(32);
    let set = format!(
        "set=1\nprivate_key={key}\nlisten_port=4510\nfwmark=1\nreplace_peers=true\npublic_key={key}\nremove=true\n\
         update_only=true\npreshared_key={key}\nendpoint=[::1]:4510\npersistent_keepalive_interval=10\n\
         replace_allowed_ips=true\nallowed_ip=10.0.0.0/8\nallowed_ip=fd00::/8\nprotocol_version=1\n"
    );
    write(&dir, "uapi", vec![b"get=1".to_vec(), set.into_bytes()])?;
    let packet = |first: u8, length: usize| [vec![first, 0, 0, 0], vec![0; length - 4]].concat();
    let mut v4 = packet(0x45, 28);
    v4[3] = 28;
    write(
        &dir,
        "datagram",
        vec![packet(1, 148), packet(2, 92), packet(3, 64), packet(4, 48), v4, packet(0x60, 40)],
    )?;
    let flow = |first: u8| [vec![100], packet(first, 100)].concat().repeat(3);
    write(&dir, "offload", vec![flow(0x44), flow(0x45)])
}

fn one<S: Strategy>(runner: &mut TestRunner, strategy: S) -> S::Value {
    strategy.new_tree(runner).expect("a strategy without a value").current()
}

fn write(dir: &Path, target: &str, seeds: Vec<Vec<u8>>) -> std::io::Result<()> {
    let dir = dir.join(target);
    fs::create_dir_all(&dir)?;
    (0..).zip(seeds).try_for_each(|(n, seed): (usize, _)| fs::write(dir.join(format!("seed-{n}")), seed))
}

/// What a member says to a broker that knows nothing.
fn session() -> Vec<u8> {
    let mut member = oslo();
    let mut broker = Replica::new(common::roots(), Interest::All);
    let mut link = Link::new(member.introduction(), Introduction::default());
    let mut said = Vec::new();
    for _ in 0..20 {
        while link.transmit(0, &member.replica) {}
        for message in &link.wires[0] {
            said.extend(u16::try_from(message.len()).expect("a short message").to_be_bytes());
            said.extend(message);
        }
        while let Ok(true) = link.receive(1, &mut broker) {}
        while link.transmit(1, &broker) {}
        while let Ok(true) = link.receive(0, &mut member.replica) {}
    }
    said
}

/// A query for addresses, with EDNS (RFC 1035, RFC 6891).
fn question(name: &str) -> Vec<u8> {
    let mut query = vec![1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
    for label in name.split('.').chain(["svc", "clusterset", "local"]) {
        query.push(u8::try_from(label.len()).expect("a short label"));
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1, 0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
    query
}
