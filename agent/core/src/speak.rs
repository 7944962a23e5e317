//! Where the own cluster speaks next.

use tombolo_proto::model::Position;

/// What the leader knows of its own positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Voice {
    /// Reserved with the lead.
    pub epoch: u64,
    /// The last position it signed since it leads.
    pub last: Option<Position>,
    /// The highest position of the own cluster that anybody has shown, signed by its key.
    pub seen: Option<Position>,
}

/// What the leader may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Sign at this position, if there is anything new to say.
    Speak(Position),
    /// Somebody has seen a higher position: reserve an epoch above this one first.
    Reserve(u64),
    /// No epoch is above the one that was seen: only another generation or serial is.
    Exhausted(Position),
}

impl Voice {
    /// The turn under the newest membership. Whole positions are compared: what was said under an older serial or
    /// generation is behind, whatever its epoch.
    pub fn turn(&self, serial: u64, generation: u32) -> Turn {
        let own = Position { serial, generation, epoch: self.epoch, sequence: 0 };
        let same = |last: &Position| Position { sequence: 0, ..*last } == own;
        let reached = self.last.filter(same).unwrap_or(own);
        let highest = self.last.max(self.seen).unwrap_or(own);
        let next = reached.sequence.checked_add(1).filter(|_| highest <= reached);
        match next {
            Some(sequence) => Turn::Speak(Position { sequence, ..reached }),
            // A membership never goes back; should one be shown that does, nothing is said under it.
            None if highest.epoch == u64::MAX
                || (highest.serial, highest.generation) > (serial, generation) =>
            {
                Turn::Exhausted(highest)
            }
            None => Turn::Reserve(highest.epoch),
        }
    }

    /// Whether what was said last was said under this membership; if not, it is to be said again.
    pub fn is_under(&self, serial: u64, generation: u32) -> bool {
        self.last.is_some_and(|last| (last.serial, last.generation) == (serial, generation))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(serial: u64, generation: u32, epoch: u64, sequence: u64) -> Position {
        Position { serial, generation, epoch, sequence }
    }

    fn voice(epoch: u64, last: Option<Position>, seen: Option<Position>) -> Voice {
        Voice { epoch, last, seen }
    }

    #[test]
    fn counts_up() {
        assert_eq!(voice(9, None, None).turn(1, 0), Turn::Speak(at(1, 0, 9, 1)));
        let last = at(1, 0, 9, 4);
        // Its own words come back to it.
        assert_eq!(voice(9, Some(last), Some(last)).turn(1, 0), Turn::Speak(at(1, 0, 9, 5)));
    }

    #[test]
    fn reserves_above_what_was_seen() {
        assert_eq!(voice(9, None, Some(at(1, 0, 9, 1))).turn(1, 0), Turn::Reserve(9));
        assert_eq!(voice(9, Some(at(1, 0, 9, 1)), Some(at(1, 0, 9, 2))).turn(1, 0), Turn::Reserve(9));
        assert_eq!(voice(9, None, Some(at(1, 0, 77, 1))).turn(1, 0), Turn::Reserve(77));
        assert_eq!(voice(9, None, Some(at(1, 0, 8, 99))).turn(1, 0), Turn::Speak(at(1, 0, 9, 1)));
        assert_eq!(voice(9, Some(at(1, 0, 9, u64::MAX)), None).turn(1, 0), Turn::Reserve(9));
    }

    #[test]
    fn an_older_serial_or_generation_does_not_count() {
        let seen = Some(at(1, 3, u64::MAX, 7));
        assert_eq!(voice(9, None, seen).turn(2, 0), Turn::Speak(at(2, 0, 9, 1)));
        assert_eq!(voice(9, None, seen).turn(1, 4), Turn::Speak(at(1, 4, 9, 1)));
        assert_eq!(voice(9, Some(at(1, 0, 9, 30)), seen).turn(2, 0), Turn::Speak(at(2, 0, 9, 1)));
    }

    #[test]
    fn the_end_of_the_range_is_told() {
        let seen = at(1, 0, u64::MAX, 7);
        assert_eq!(voice(9, None, Some(seen)).turn(1, 0), Turn::Exhausted(seen));
        let newer = at(2, 0, 5, 7);
        assert_eq!(voice(9, None, Some(newer)).turn(1, 0), Turn::Exhausted(newer));
    }

    fn any_position() -> impl Strategy<Value = Position> {
        let edge = prop_oneof![0_u64..3, Just(u64::MAX - 1), Just(u64::MAX)];
        (0_u64..3, 0_u32..3, edge.clone(), edge).prop_map(|(s, g, e, q)| at(s, g, e, q))
    }

    proptest! {
        #[test]
        fn what_is_signed_is_above_all_before(
            epoch in prop_oneof![0_u64..3, Just(u64::MAX)],
            last in proptest::option::of(any_position()),
            seen in proptest::option::of(any_position()),
            serial in 0_u64..3,
            generation in 0_u32..3,
        ) {
            match voice(epoch, last, seen).turn(serial, generation) {
                Turn::Speak(next) => {
                    prop_assert!(Some(next) > last && Some(next) > seen, "{next}");
                    prop_assert_eq!((next.serial, next.generation, next.epoch), (serial, generation, epoch));
                }
                Turn::Reserve(floor) => prop_assert!(floor < u64::MAX && floor >= epoch),
                Turn::Exhausted(_) => {}
            }
        }
    }
}
