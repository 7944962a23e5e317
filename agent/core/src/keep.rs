//! When what is kept of a cluster in the cluster's API is written anew.

use std::time::Duration;

use tombolo_proto::model::Position;

/// A Member whose position alone moved is not rewritten more often: it says how far back nobody may roll the cluster
/// after a restart, and need not be exact. But what is said with another key, or under another grant, is kept at once:
/// after it the one before says nothing any more.
pub const POSITION_EVERY: Duration = Duration::from_secs(10);

/// What is kept of a cluster, against what is held of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// Its memberships are the ones that are held.
    pub memberships: bool,
    /// Its node records are the ones that are held.
    pub nodes: bool,
    /// Its statement and second hash fit its node records: who reads only these can check them.
    pub whole: bool,
    /// Position of its statement.
    pub position: Option<Position>,
    /// When this leader wrote it last.
    pub written: Option<Duration>,
}

/// What to do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rewrite {
    /// It is as it should be, or something newer was kept.
    No,
    /// At once.
    Now,
    /// Then, if the position is still another.
    At(Duration),
}

/// Decides at `now`. `held`: where the cluster has come to; `floor`: below which nothing of it counts, since a higher
/// one was verified.
pub fn rewrite(kept: Option<&Kept>, held: Position, floor: Option<Position>, now: Duration) -> Rewrite {
    if floor.is_some_and(|floor| held < floor) {
        return Rewrite::No;
    }
    let Some(kept) = kept else { return Rewrite::Now };
    if !(kept.memberships && kept.nodes && kept.whole) {
        return Rewrite::Now;
    }
    if kept.position == Some(held) {
        return Rewrite::No;
    }
    let voice = |position: Position| (position.serial, position.generation);
    if kept.position.map(voice) != Some(voice(held)) {
        return Rewrite::Now;
    }
    match kept.written.map(|written| written + POSITION_EVERY) {
        Some(due) if now < due => Rewrite::At(due),
        _ => Rewrite::Now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(sequence: u64) -> Position {
        Position { serial: 1, generation: 0, epoch: 5, sequence }
    }

    const NOW: Duration = Duration::from_secs(100);
    const GOOD: Kept = Kept {
        memberships: true,
        nodes: true,
        whole: true,
        position: Some(Position { serial: 1, generation: 0, epoch: 5, sequence: 7 }),
        written: Some(NOW),
    };

    #[test]
    fn what_is_right_is_left() {
        assert_eq!(rewrite(Some(&GOOD), at(7), Some(at(7)), NOW), Rewrite::No);
        assert_eq!(rewrite(None, at(7), None, NOW), Rewrite::Now);
    }

    #[test]
    fn a_torn_write_is_mended_at_once() {
        for broken in [
            Kept { whole: false, ..GOOD },
            Kept { nodes: false, ..GOOD },
            Kept { memberships: false, ..GOOD },
        ] {
            assert_eq!(rewrite(Some(&broken), at(7), Some(at(7)), NOW), Rewrite::Now, "{broken:?}");
        }
    }

    #[test]
    fn it_never_goes_back() {
        let torn = Kept { whole: false, nodes: false, ..GOOD };
        assert_eq!(rewrite(Some(&torn), at(6), Some(at(7)), NOW), Rewrite::No);
    }

    #[test]
    fn another_key_or_grant_is_kept_at_once() {
        assert_eq!(rewrite(Some(&GOOD), Position { generation: 1, ..at(1) }, None, NOW), Rewrite::Now);
        assert_eq!(rewrite(Some(&GOOD), Position { serial: 2, ..at(1) }, None, NOW), Rewrite::Now);
    }

    #[test]
    fn positions_alone_are_written_now_and_then() {
        let due = NOW + POSITION_EVERY;
        assert_eq!(rewrite(Some(&GOOD), at(8), None, NOW), Rewrite::At(due));
        assert_eq!(rewrite(Some(&GOOD), at(8), None, due), Rewrite::Now);
        assert_eq!(rewrite(Some(&Kept { written: None, ..GOOD }), at(8), None, NOW), Rewrite::Now);
    }
}
