/// A member with two records; whoever makes it makes the same.
pub fn oslo() -> Member {
    let mut member = Member::new("oslo", 1);
    member.set(scope(0), record(1, 1, 40));
    member.set(scope(1), record(2, 2, 40));
    member.publish();
    member
}
