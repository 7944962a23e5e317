use proptest::prelude::*;
use tombolo_proto::model::{DeviceNumber, WireguardKey};

use super::*;

const STEP: Duration = Duration::from_millis(1);

fn id(n: u8) -> PeerId {
    (DeviceNumber::new(1).unwrap(), WireguardKey([n; 32]))
}

/// One peer at the end of a path.
struct Path {
    mtu: PathMtu,
    now: Duration,
    /// What the path carries.
    carries: u16,
    /// One way.
    takes: Duration,
    /// Of a hundred packets, each way.
    loss: u64,
    random: u64,
    coming: Vec<(Duration, u16)>,
    sent: Vec<u16>,
}

impl Path {
    fn new(longest: u16, carries: u16) -> Self {
        let mut mtu = PathMtu::default();
        mtu.handle_peers(Duration::ZERO, &[(id(1), longest)].into(), &BTreeMap::new());
        mtu.handle_alive(Duration::ZERO, &[id(1)].into());
        let takes = Duration::from_millis(10);
        let (coming, sent) = (Vec::new(), Vec::new());
        Self { mtu, now: Duration::ZERO, carries, takes, loss: 0, random: 1, coming, sent }
    }

    fn lost(&mut self) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % 100 < self.loss
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            let now = self.now;
            let (there, later) = std::mem::take(&mut self.coming).into_iter().partition(|(at, _)| *at <= now);
            self.coming = later;
            let there: Vec<(Duration, u16)> = there;
            there.iter().for_each(|(_, sequence)| self.mtu.handle_answer(now, id(1), *sequence));
            while let Some(probe) = self.mtu.poll_transmit(now) {
                self.sent.push(probe.length);
                if probe.length <= self.carries && !self.lost() && !self.lost() {
                    self.coming.push((now + self.takes * 2, probe.sequence));
                }
            }
            let next = self.mtu.poll_timeout().into_iter().chain(self.coming.iter().map(|(at, _)| *at));
            self.now = next.fold(end, Duration::min).max(now + STEP);
        }
    }

    fn length(&self) -> u16 {
        self.mtu.length(id(1)).unwrap()
    }
}

const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn a_path_that_narrows_is_found_in_time() {
    for (carries, found) in [(1240, 1240), (1239, 1220), (1400, 1400), (1419, 1400), (1201, 1200)] {
        let mut path = Path::new(1420, 1420);
        path.run(seconds(61));
        path.carries = carries;
        path.run(seconds(8));
        assert_eq!(path.length(), found, "of {carries}");
        assert_eq!(path.mtu.narrow(), [(id(1), found)].into());
    }
}

#[test]
fn while_all_is_well_it_costs_a_probe_in_five_seconds() {
    let mut path = Path::new(1420, 1420);
    path.run(seconds(3600));
    assert!((700..=970).contains(&path.sent.len()), "{} probes", path.sent.len());
    assert!(path.sent.iter().all(|length| *length == 1420));
    assert!(path.mtu.narrow().is_empty());
}

#[test]
fn who_does_not_answer_at_all_tells_nothing() {
    let mut path = Path::new(1420, 1420);
    path.run(seconds(20));
    path.loss = 100;
    path.run(seconds(60));
    assert_eq!(path.length(), 1420);
    path.mtu.handle_alive(path.now, &BTreeSet::new());
    let before = path.sent.len();
    path.run(seconds(60));
    assert_eq!((path.length(), path.sent.len()), (1420, before), "the dead are not asked");
}

#[test]
fn loss_is_no_narrow_path() {
    let mut path = Path::new(1420, 1420);
    path.loss = 5;
    for hour in 0..48 {
        path.run(seconds(3600));
        assert_eq!(path.length(), 1420, "in hour {hour}");
    }
}

#[test]
fn a_path_that_widens_is_found() {
    let mut path = Path::new(1420, 1300);
    path.run(seconds(8));
    assert_eq!(path.length(), 1300);
    path.run(seconds(600));
    assert_eq!(path.length(), 1300, "nothing moves while nothing changes");
    path.carries = 1420;
    path.run(seconds(62));
    assert_eq!(path.length(), 1420);
}

#[test]
fn long_frames_have_their_steps() {
    for (carries, found) in [(8920, 8920), (8000, 7805), (1500, 1420), (1419, 1400)] {
        let mut path = Path::new(8920, carries);
        path.run(seconds(10));
        assert_eq!(path.length(), found, "of {carries}");
    }
    assert_eq!(ladder(1280).into_iter().collect::<Vec<_>>(), [1200, 1220, 1240, 1260, 1280]);
}

#[test]
fn what_a_predecessor_knew_stays() {
    let mut path = Path::new(1420, 1240);
    path.mtu = PathMtu::default();
    path.mtu.handle_peers(Duration::ZERO, &[(id(1), 1420)].into(), &[(id(1), 1240)].into());
    assert_eq!(path.length(), 1240);
    path.mtu.handle_alive(Duration::ZERO, &[id(1)].into());
    path.run(seconds(30));
    assert_eq!(path.length(), 1240);
    assert!(path.sent.iter().all(|length| *length == 1240));
    // Another device.
    path.mtu.handle_peers(path.now, &[(id(1), 8920)].into(), &BTreeMap::new());
    assert_eq!(path.length(), 8920);
}

#[test]
fn a_slow_path_is_no_narrow_one() {
    let mut path = Path::new(1420, 1420);
    path.takes = seconds(1);
    path.run(seconds(600));
    assert_eq!(path.length(), 1420);
}

#[test]
fn a_crowd_is_asked_less_often() {
    let mut mtu = PathMtu::default();
    let all: BTreeMap<PeerId, u16> = (0..=255)
        .flat_map(|n| (0..8).map(move |d| ((DeviceNumber::new(d).unwrap(), WireguardKey([n; 32])), 1420)))
        .collect();
    mtu.handle_peers(Duration::ZERO, &all, &BTreeMap::new());
    mtu.handle_alive(Duration::ZERO, &all.keys().copied().collect());
    let mut count = 0;
    for second in 0..120 {
        let now = seconds(second);
        while let Some(probe) = mtu.poll_transmit(now) {
            count += 1;
            mtu.handle_answer(now, probe.peer, probe.sequence);
        }
    }
    assert!(count < 2048 * 6, "{count} probes of 2,048 peers in two minutes");
}

proptest! {
    #[test]
    fn anything_goes(
        longest in 600..9000_u16,
        memory in proptest::option::of(any::<u16>()),
        steps in prop::collection::vec((0..20_000_u64, any::<bool>(), any::<u16>(), any::<u16>()), 0..200),
    ) {
        let mut mtu = PathMtu::default();
        let peers = BTreeMap::from([(id(1), longest), (id(2), longest)]);
        let memory = memory.into_iter().map(|length| (id(1), length)).collect();
        mtu.handle_peers(Duration::ZERO, &peers, &memory);
        let mut now = Duration::ZERO;
        for (millis, alive, sequence, carries) in steps {
            now += Duration::from_millis(millis);
            mtu.handle_alive(now, &if alive { [id(1), id(2)].into() } else { [id(2)].into() });
            mtu.handle_answer(now, id(1), sequence);
            let mut count = 0;
            while let Some(probe) = mtu.poll_transmit(now) {
                count += 1;
                prop_assert!(count < 200, "it never ends");
                prop_assert!(probe.length <= longest.max(SHORT));
                if probe.length <= carries {
                    mtu.handle_answer(now, probe.peer, probe.sequence);
                }
            }
            for peer in [id(1), id(2)] {
                let length = mtu.length(peer).unwrap();
                prop_assert!((LEAST.min(longest)..=longest).contains(&length));
            }
        }
    }
}
