//! An evil broker: with the honest one's key and address, between the honest clusters.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tombolo_lab::{Lab, wait_until};
use tombolo_proto::model::ClusterId;
use tombolo_proto::wire::{Message, Update};

use crate::evil::Evil;
use crate::forged;
use crate::honest::{self, SOON, intact, logged, metric};
use crate::mallory::{Mallory, PODS};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Honest,
    /// A bit of every record.
    FlipRecords,
    /// A bit of what was signed, or of the signature.
    FlipStatements,
    /// A record of every change.
    DropRecords,
    /// Statements under another cluster's name, or with another statement's leaves.
    Mix,
    /// Every message again, and old ones after it.
    Replay,
    /// Says nothing at all after the documents.
    Withhold,
}

struct Liar {
    mode: Mutex<Mode>,
    past: Mutex<Vec<Message>>,
    lies: AtomicUsize,
}

impl Liar {
    fn new() -> Arc<Self> {
        Arc::new(Self { mode: Mutex::new(Mode::Honest), past: Mutex::default(), lies: AtomicUsize::new(0) })
    }

    fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }

    fn tell(&self, message: Message) -> Vec<Message> {
        let mode = *self.mode.lock().unwrap();
        let mut past = self.past.lock().unwrap();
        let mut out = vec![message.clone()];
        if let Message::Update(_) | Message::Chunk(_) = message {
            match mode {
                Mode::Honest => {}
                Mode::FlipRecords => out = vec![flip_records(message.clone())],
                Mode::FlipStatements => out = vec![flip_statement(message.clone(), past.len())],
                Mode::DropRecords => out = vec![drop_record(message.clone())],
                Mode::Mix => out = mix(&message, &past),
                Mode::Replay => out.extend(past.iter().cloned()),
                Mode::Withhold => out.clear(),
            }
        }
        if out != [message.clone()] {
            self.lies.fetch_add(1, Ordering::Relaxed);
        }
        if mode == Mode::Honest || past.len() < 20 {
            past.push(message);
            if past.len() > 200 {
                past.remove(20);
            }
        }
        out
    }
}

fn flip(body: &Arc<[u8]>) -> Arc<[u8]> {
    let mut bytes = body.to_vec();
    match bytes.last_mut() {
        Some(byte) => *byte ^= 1,
        None => bytes.push(1),
    }
    bytes.into()
}

fn flip_records(mut message: Message) -> Message {
    match &mut message {
        Message::Chunk(chunk) => chunk.records.iter_mut().for_each(|r| r.body = flip(&r.body)),
        Message::Update(update) => {
            update.deltas.iter_mut().flat_map(|d| &mut d.upserts).for_each(|r| r.body = flip(&r.body));
        }
        _ => {}
    }
    message
}

fn flip_statement(mut message: Message, count: usize) -> Message {
    if let Message::Update(update) = &mut message {
        if count.is_multiple_of(2) {
            update.statement.payload = flip(&update.statement.payload);
        } else {
            update.statement.signature[5] ^= 1;
        }
    }
    message
}

fn drop_record(mut message: Message) -> Message {
    match &mut message {
        Message::Chunk(chunk) => drop(chunk.records.pop()),
        Message::Update(update) => update.deltas.iter_mut().for_each(|d| {
            d.upserts.pop();
            d.removed.pop();
        }),
        _ => {}
    }
    message
}

fn mix(message: &Message, past: &[Message]) -> Vec<Message> {
    let Message::Update(update) = message else { return vec![message.clone()] };
    let updates = || {
        past.iter().rev().filter_map(|m| match m {
            Message::Update(u) => Some(u),
            _ => None,
        })
    };
    let mut out = Vec::new();
    // An older statement's content under the new signature, and the other way round.
    if let Some(old) = updates().find(|u| u.origin == update.origin && u.statement != update.statement) {
        let content = Update { statement: update.statement.clone(), ..old.clone() };
        out.push(Message::Update(content));
        out.push(Message::Update(Update { statement: old.statement.clone(), ..update.clone() }));
    }
    // Another cluster's words.
    if let Some(other) = updates().find(|u| u.origin != update.origin) {
        out.push(Message::Update(Update { origin: other.origin.clone(), ..update.clone() }));
    }
    out
}

/// News of us-east, until something holds.
fn while_news(lab: &Lab, what: &str, mut look: impl FnMut() -> Result<()>) -> Result<()> {
    let mut exported = false;
    let mut last = Instant::now();
    wait_until(what, SOON, || {
        if last.elapsed() > Duration::from_millis(200) {
            last = Instant::now();
            exported = !exported;
            if exported {
                lab.export("us-east", "production", "web")?;
                lab.unexport("eu-west", "production", "db")?;
            } else {
                lab.unexport("us-east", "production", "web")?;
                lab.export("eu-west", "production", "db")?;
            }
        }
        look()
    })?;
    if exported {
        lab.unexport("us-east", "production", "web")?;
        lab.export("eu-west", "production", "db")?;
    }
    Ok(())
}

/// What is true again, once nobody lies.
fn recovered(lab: &Lab) -> Result<()> {
    let ask = || lab.ask("eu-c", "web.production.svc.clusterset.local", 1);
    lab.export("us-east", "production", "web")?;
    wait_until("the truth: web", SOON, || {
        let answer = ask()?;
        ensure!(answer.0 == 0 && answer.1.len() == 1, "web answers {answer:?}");
        Ok(())
    })?;
    lab.unexport("us-east", "production", "web")?;
    wait_until("the truth: no web", SOON, || {
        let answer = ask()?;
        ensure!(answer.0 == 3, "web answers {answer:?}");
        Ok(())
    })
    .map(drop)
}

/// `refused` are words of log lines; `counted` says that the metric of refusals grows as well.
fn lying(name: &str, mode: Mode, refused: &[&[&str]], counted: bool) {
    honest::story(name, || {
        let lab = honest::up()?;
        let liar = Liar::new();
        let hook = liar.clone();
        let _evil = Evil::replace(&lab, "broker", Arc::new(move |_, message| hook.tell(message)))?;
        recovered(&lab)?;
        let before = metric(&lab, "eu-west", "tombolo_refusals_total")?;
        liar.set(mode);
        let flow = lab.udp_flow("us-c", lab.topology().pod("eu-c")?.v4.into(), 200)?;
        while_news(&lab, "the lie to be seen", || {
            ensure!(liar.lies.load(Ordering::Relaxed) >= 2, "{} lies", liar.lies.load(Ordering::Relaxed));
            refused.iter().try_for_each(|words| logged(&lab, "eu-west", words))?;
            if counted {
                let now = metric(&lab, "eu-west", "tombolo_refusals_total")?;
                ensure!(now > before, "{now} refusals counted, {before} before");
            }
            Ok(())
        })?;
        intact(&lab, "nobody", &["web.production", "api-service.production", "db.production"])?;
        honest::talk(&lab)?;
        liar.set(Mode::Honest);
        recovered(&lab)?;
        intact(&lab, "nobody", &["web.production"])?;
        let report = flow.stop_udp()?;
        ensure!(report.sent > 50 && report.lost == 0, "traffic suffered: {report:?}");
        Ok(())
    });
}

#[test]
fn an_evil_broker_that_flips_bits_of_records() {
    let words: &[&[&str]] = &[&["does not fit what"]];
    lying("brokers::an_evil_broker_that_flips_bits_of_records", Mode::FlipRecords, words, true);
}

#[test]
fn an_evil_broker_that_flips_bits_of_statements() {
    let words: &[&[&str]] = &[&["the statement of us-east is refused"]];
    lying("brokers::an_evil_broker_that_flips_bits_of_statements", Mode::FlipStatements, words, true);
}

#[test]
fn an_evil_broker_that_drops_records() {
    let words: &[&[&str]] = &[&["does not fit what"]];
    lying("brokers::an_evil_broker_that_drops_records", Mode::DropRecords, words, true);
}

#[test]
fn an_evil_broker_that_mixes_statements() {
    let words: &[&[&str]] = &[&["does not fit what"]];
    lying("brokers::an_evil_broker_that_mixes_statements", Mode::Mix, words, true);
}

#[test]
fn an_evil_broker_that_replays() {
    lying("brokers::an_evil_broker_that_replays", Mode::Replay, &[], false);
}

#[test]
fn an_evil_broker_that_withholds() {
    lying("brokers::an_evil_broker_that_withholds", Mode::Withhold, &[], false);
}

/// What a broker holds back is missed: the clusters' nodes tell each other over the tunnels how far they have come.
/// In full runs alone, since it is told after more than half a minute.
#[test]
fn what_a_broker_withholds_is_missed() {
    honest::story("brokers::what_a_broker_withholds_is_missed", || {
        if !tombolo_lab::strict() {
            return Ok(());
        }
        let lab = honest::up()?;
        let liar = Liar::new();
        let hook = liar.clone();
        let _evil = Evil::replace(&lab, "broker", Arc::new(move |_, message| hook.tell(message)))?;
        recovered(&lab)?;
        liar.set(Mode::Withhold);
        lab.export("us-east", "production", "web")?;
        honest::told_within(&lab, "eu-west", "NewsWithheld", "cluster us-east", SOON * 2)?;
        ensure!(lab.ask("eu-c", "web.production.svc.clusterset.local", 1)?.0 == 3, "it was not withheld");
        intact(&lab, "nobody", &["web.production", "api-service.production"])?;
        honest::talk(&lab)
    });
}

/// One honest broker is enough: what the evil one holds back, rolls back or bends comes from the other.
#[test]
fn an_evil_broker_beside_an_honest_one() {
    honest::story("brokers::an_evil_broker_beside_an_honest_one", || {
        let lab = honest::up_by(&["broker", "honest"])?;
        let liar = Liar::new();
        let hook = liar.clone();
        let _evil = Evil::replace(&lab, "broker", Arc::new(move |_, message| hook.tell(message)))?;
        for cluster in ["eu-west", "us-east"] {
            wait_until("a session with both brokers", SOON, || {
                let sessions = metric(&lab, cluster, "tombolo_broker_sessions{")?;
                ensure!(sessions >= 2.0, "{cluster} has {sessions}");
                Ok(())
            })?;
        }
        recovered(&lab)?;
        let flow = lab.udp_flow("us-c", lab.topology().pod("eu-c")?.v4.into(), 200)?;
        for mode in [Mode::Withhold, Mode::Replay, Mode::FlipStatements, Mode::FlipRecords, Mode::Mix] {
            let before = liar.lies.load(Ordering::Relaxed);
            liar.set(mode);
            recovered(&lab).with_context(|| format!("{mode:?}"))?;
            // Sessions that lies end come again, slower each time: not every lie gets its chance at once.
            println!("{mode:?}: {} lies", liar.lies.load(Ordering::Relaxed) - before);
        }
        ensure!(liar.lies.load(Ordering::Relaxed) > 0, "it told no lie");
        intact(&lab, "nobody", &["web.production", "api-service.production", "db.production"])?;
        honest::talk(&lab)?;
        let report = flow.stop_udp()?;
        ensure!(report.sent > 50 && report.lost == 0, "traffic suffered: {report:?}");
        Ok(())
    });
}

/// The broker comes back with an old disk, where `web` is still exported, while its cluster is away and the receivers
/// start anew: they remember how far that cluster had come.
#[test]
fn an_old_disk_rolls_nobody_back_over_a_restart() {
    honest::story("brokers::an_old_disk_rolls_nobody_back_over_a_restart", || {
        let lab = honest::up()?;
        let web = || lab.ask("eu-c", "web.production.svc.clusterset.local", 1);
        lab.export("us-east", "production", "web")?;
        wait_until("web", SOON, || {
            ensure!(web()?.0 == 0, "not yet");
            Ok(())
        })?;
        // The disk as it is now.
        let data = lab.state_dir("broker").join("data");
        let copy = lab.state_dir("broker").join("copy");
        lab.kill("broker", "broker")?;
        std::fs::create_dir(&copy)?;
        for entry in std::fs::read_dir(&data)? {
            let entry = entry?;
            std::fs::copy(entry.path(), copy.join(entry.file_name()))?;
        }
        lab.restart("broker", "broker")?;
        let position = |of: &str| -> Result<Option<tombolo_proto::model::Position>> {
            let observed = tombolo_agent::api::directory::Directory::open(lab.cluster_dir("eu-west"))?.read();
            let members = observed.members.get().context("members")?;
            let statement = members.get(&ClusterId::new(of)?).and_then(|m| m.statement.clone());
            let read = statement.map(|s| tombolo_proto::wire::decode_statement(&s.payload)).transpose()?;
            Ok(read.map(|statement| statement.position))
        };
        let said = || -> Result<Option<tombolo_proto::model::Position>> {
            let observed = tombolo_agent::api::directory::Directory::open(lab.cluster_dir("us-east"))?.read();
            let members = observed.members.get().context("members")?;
            let statement = members.get(&ClusterId::new("us-east")?).and_then(|m| m.statement.clone());
            let read = statement.map(|s| tombolo_proto::wire::decode_statement(&s.payload)).transpose()?;
            Ok(read.map(|statement| statement.position))
        };
        let old = position("us-east")?.context("us-east is known")?;
        lab.unexport("us-east", "production", "web")?;
        wait_until("web to go", SOON, || {
            ensure!(web()?.0 == 3, "web answers {:?}", web()?);
            Ok(())
        })?;
        // What it remembers is written seldom.
        wait_until("the newer position to be kept", SOON, || {
            let (kept, said) = (position("us-east")?, said()?);
            ensure!(kept > Some(old) && kept >= said, "{kept:?}, {old:?} before, {said:?} said");
            Ok(())
        })?;
        honest::down(&lab, "us-east")?;
        lab.kill("broker", "broker")?;
        std::fs::remove_dir_all(&data)?;
        std::fs::rename(&copy, &data)?;
        honest::down(&lab, "eu-west")?;
        lab.restart("broker", "broker")?;
        honest::again(&lab, "eu-west")?;
        wait_until("the old statement to be refused", SOON, || {
            ensure!(web()?.0 != 0, "web is back: {:?}", web()?);
            logged(&lab, "eu-west", &["the statement of us-east is refused"])?;
            ensure!(metric(&lab, "eu-west", "tombolo_refusals_total")? > 0.0, "no refusal is counted");
            Ok(())
        })?;
        ensure!(web()?.0 == 3, "web answers {:?}", web()?);
        honest::again(&lab, "us-east")?;
        lab.wait_ready()?;
        recovered(&lab)?;
        intact(&lab, "nobody", &["web.production", "api-service.production"])?;
        wait_until("the honest service", SOON, || honest::talk(&lab)).map(drop)
    });
}

/// The same forgeries as through an honest broker, by one that lets everything pass.
#[test]
fn cve_2026_66788_rewriting_through_an_accomplice() {
    honest::story("brokers::cve_2026_66788_rewriting_through_an_accomplice", || {
        let lab = honest::up()?;
        lab.export("us-east", "production", "web")?;
        wait_until("web", SOON, || {
            ensure!(lab.ask("eu-c", "web.production.svc.clusterset.local", 1)?.0 == 0, "not yet");
            Ok(())
        })?;
        let forgeries: Arc<Mutex<Vec<Message>>> = Arc::default();
        let hook = forgeries.clone();
        let injected = Arc::new(AtomicUsize::new(0));
        let count = injected.clone();
        let _evil = Evil::replace(
            &lab,
            "broker",
            Arc::new(move |_, message| {
                let mut out = vec![message.clone()];
                if let Message::Update(_) | Message::Have(_) = message {
                    let forged = hook.lock().unwrap();
                    if !forged.is_empty() {
                        // One lie a session: some end it.
                        out.extend(forged.get(count.fetch_add(1, Ordering::Relaxed) % forged.len()).cloned());
                    }
                }
                out
            }),
        )?;
        let mut mallory = Mallory::admitted(&lab, "mallory", &PODS, &["production", "team-*"])?;
        mallory.join();
        let mut mallory = {
            mallory.say(forged::mark("marked")?)?;
            honest::knowing(&lab, mallory)?
        };
        wait_until("the liar's own service", SOON, || {
            ensure!(lab.ask("eu-c", "marked.team-blue.svc.clusterset.local", 1)?.0 == 0, "not yet");
            Ok(())
        })?;
        let before = honest::kept(&lab, "us-east")?;
        let mut lies: Vec<Message> = Vec::new();
        for (_, messages) in forged::statements(&mallory, "us-east")? {
            lies.extend(messages);
        }
        lies.extend(forged::documents(&mallory, "us-east")?.into_iter().map(|(_, d)| Message::Documents(d)));
        let all = lies.len();
        *forgeries.lock().unwrap() = lies;
        // Everything that comes from the liar makes the broker say something, and add a lie.
        wait_until("every lie to be told, three times", SOON, || {
            mallory.sign()?;
            let told = injected.load(Ordering::Relaxed);
            ensure!(told > 6 * all, "{told} of {}", 6 * all);
            Ok(())
        })?;
        for words in [
            ["the statement of us-east is refused"],
            ["the membership of us-east is refused"],
            ["the membership of mallory is refused"],
            ["the list of revocations is refused"],
            ["the list of brokers is refused"],
            ["the set's roots is refused"],
        ] {
            logged(&lab, "eu-west", &words)?;
        }
        ensure!(metric(&lab, "eu-west", "tombolo_refusals_total")? >= 6.0, "refusals are not counted");
        ensure!(honest::kept(&lab, "us-east")? == before, "what eu-west keeps of us-east changed");
        ensure!(lab.ask("eu-c", "pwned.production.svc.clusterset.local", 1)?.0 == 3, "pwned is there");
        ensure!(lab.ask("eu-c", "web.production.svc.clusterset.local", 1)?.0 == 0, "web is gone");
        intact(&lab, "mallory", &["pwned.production", "web.production", "api-service.production"])?;
        honest::talk(&lab)?;
        forgeries.lock().unwrap().clear();
        lab.unexport("us-east", "production", "web")?;
        recovered(&lab)
    });
}

/// The liar signs two statements at one position, and its accomplice shows each cluster another, then both to all.
#[test]
fn a_fork_is_told_and_the_first_is_kept() {
    honest::story("brokers::a_fork_is_told_and_the_first_is_kept", || {
        let lab = honest::up()?;
        let fork: Arc<Mutex<Option<[Vec<Message>; 2]>>> = Arc::default();
        let swapped = Arc::new(AtomicUsize::new(0));
        let (hook, swap) = (fork.clone(), swapped.clone());
        let eu = ClusterId::new("eu-west")?;
        let _evil = Evil::replace(
            &lab,
            "broker",
            Arc::new(move |to, message| {
                let mut out = vec![message];
                let to_eu = matches!(to, tombolo_broker_core::Admitted::Member(id) if *id == eu);
                if let Some([left, right]) = &*hook.lock().unwrap() {
                    let first = to_eu != (swap.load(Ordering::Relaxed) == 1);
                    out.extend(if first { left.clone() } else { right.clone() });
                }
                out
            }),
        )?;
        let mut mallory = Mallory::admitted(&lab, "mallory", &PODS, &["production", "team-*"])?;
        mallory.join();
        mallory.say(forged::mark("marked")?)?;
        for pod in ["eu-c", "us-c"] {
            wait_until("the liar's own service", SOON, || {
                ensure!(lab.ask(pod, "marked.team-blue.svc.clusterset.local", 1)?.0 == 0, "not yet");
                Ok(())
            })?;
        }
        *fork.lock().unwrap() = Some(forged::fork(&mallory, "left", "right")?);
        let has = |pod: &str, name: &str| -> Result<bool> {
            Ok(lab.ask(pod, &format!("{name}.team-blue.svc.clusterset.local"), 1)?.0 == 0)
        };
        while_news(&lab, "each to have its own", || {
            ensure!(has("eu-c", "left")? && has("us-c", "right")?, "not yet");
            Ok(())
        })?;
        swapped.store(1, Ordering::Relaxed);
        while_news(&lab, "the fork to be told", || {
            for cluster in ["eu-west", "us-east"] {
                logged(&lab, cluster, &["the statement of mallory is refused", "two different ones"])?;
                ensure!(metric(&lab, cluster, "tombolo_refusals_total")? > 0.0, "not counted");
            }
            Ok(())
        })?;
        ensure!(has("eu-c", "left")? && !has("eu-c", "right")?, "eu-west changed its mind");
        ensure!(has("us-c", "right")? && !has("us-c", "left")?, "us-east changed its mind");
        intact(&lab, "mallory", &["left.team-blue", "right.team-blue"])?;
        honest::talk(&lab)
    });
}
