//! Our rules: those with [`ROUTE_PROTOCOL`].

use std::collections::BTreeSet;

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::route::RouteProtocol;
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use tombolo_agent_core::desired::{LANE_MASK, MARK, MARK_MASK, ROUTE_PROTOCOL, Rule, Selector, lane_mark};
use tombolo_proto::model::{Family, Lanes};

use super::netlink::{Netlink, NetlinkError, device_number};
use super::{Action, ApplyError, Report, Subject};

/// Our rules as they are, and as the kernel said them; `None`: ours by its mark, but of no shape that we make.
pub(super) type Actual = Vec<(Option<Rule>, RuleMessage)>;

/// Reads them.
pub(super) async fn read(netlink: &Netlink) -> Result<Actual, NetlinkError> {
    let mut actual = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RuleMessage::default();
        request.header.family = family;
        for message in netlink.dump(RouteNetlinkMessage::GetRule(request)).await? {
            let RouteNetlinkMessage::NewRule(message) = message else { continue };
            if message.attributes.contains(&RuleAttribute::Protocol(RouteProtocol::Other(ROUTE_PROTOCOL))) {
                actual.push((parse(&message), message));
            }
        }
    }
    Ok(actual)
}

/// What is to be done.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Diff {
    add: Vec<Rule>,
    remove: Vec<(Option<Rule>, RuleMessage)>,
}

/// Compares; of rules that are there twice, one stays.
pub(super) fn diff(desired: &BTreeSet<Rule>, actual: Actual) -> Diff {
    let mut there = BTreeSet::new();
    let mut remove = Vec::new();
    for (rule, message) in actual {
        match rule {
            Some(rule) if desired.contains(&rule) && !there.contains(&rule) => {
                there.insert(rule);
            }
            rule => remove.push((rule, message)),
        }
    }
    Diff { add: desired.difference(&there).cloned().collect(), remove }
}

impl Diff {
    /// Adds.
    pub(super) async fn add(&self, netlink: &Netlink, report: &mut Report) {
        for rule in &self.add {
            let change = RouteNetlinkMessage::NewRule(message(rule));
            let result = match netlink.change(change, NLM_F_CREATE | NLM_F_EXCL).await {
                Err(error) if error.errno() == Some(libc::EEXIST) => continue,
                other => other.map_err(ApplyError::Netlink),
            };
            report.note(Subject::Rule(Some(rule.clone())), Action::Added, result);
        }
    }

    /// Removes.
    pub(super) async fn remove(&self, netlink: &Netlink, report: &mut Report) {
        for (rule, message) in &self.remove {
            let result = match netlink.change(RouteNetlinkMessage::DelRule(removal(message)), 0).await {
                Err(error) if error.errno() == Some(libc::ENOENT) => continue,
                other => other.map_err(ApplyError::Netlink),
            };
            report.note(Subject::Rule(rule.clone()), Action::Removed, result);
        }
    }
}

fn message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = match rule.family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::Table(rule.table),
        RuleAttribute::Protocol(RouteProtocol::Other(ROUTE_PROTOCOL)),
    ];
    match rule.selector {
        Selector::NotMark => {
            message.header.flags = RuleFlags::Invert;
            message.attributes.extend([RuleAttribute::FwMark(MARK), RuleAttribute::FwMask(MARK_MASK)]);
        }
        Selector::Device(number) => message.attributes.push(RuleAttribute::Iifname(number.link())),
        Selector::Lane(lane) => message
            .attributes
            .extend([RuleAttribute::FwMark(lane_mark(lane)), RuleAttribute::FwMask(LANE_MASK | MARK_MASK)]),
    }
    message
}

/// What the kernel said, without what it only tells.
fn removal(message: &RuleMessage) -> RuleMessage {
    let mut removal = RuleMessage::default();
    removal.header = message.header.clone();
    removal.header.flags = message.header.flags & RuleFlags::Invert;
    removal.attributes = message.attributes.iter().filter(|a| says_which(a)).cloned().collect();
    removal
}

fn says_which(attribute: &RuleAttribute) -> bool {
    matches!(
        attribute,
        RuleAttribute::Priority(_)
            | RuleAttribute::Table(_)
            | RuleAttribute::Protocol(_)
            | RuleAttribute::FwMark(_)
            | RuleAttribute::FwMask(_)
            | RuleAttribute::Iifname(_)
            | RuleAttribute::Oifname(_)
            | RuleAttribute::Source(_)
            | RuleAttribute::Destination(_)
    )
}

fn parse(message: &RuleMessage) -> Option<Rule> {
    let family = match message.header.family {
        AddressFamily::Inet => Family::V4,
        AddressFamily::Inet6 => Family::V6,
        _ => return None,
    };
    let invert = message.header.flags.contains(RuleFlags::Invert);
    let (mut priority, mut table) = (0, u32::from(message.header.table));
    let (mut mark, mut mask, mut device) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::FwMark(number) => mark = Some(*number),
            RuleAttribute::FwMask(number) => mask = Some(*number),
            RuleAttribute::Iifname(name) => device = Some(device_number(name)?),
            RuleAttribute::Source(_)
            | RuleAttribute::Destination(_)
            | RuleAttribute::Oifname(_)
            | RuleAttribute::Goto(_)
            | RuleAttribute::UidRange(_)
            | RuleAttribute::IpProtocol(_)
            | RuleAttribute::SourcePortRange(_)
            | RuleAttribute::DestinationPortRange(_) => return None,
            _ => {}
        }
    }
    let selector = match (invert, mark, mask, device) {
        (true, Some(MARK), Some(MARK_MASK), None) => Selector::NotMark,
        (false, None, _, Some(number)) => Selector::Device(number),
        (false, Some(mark), Some(mask), None) if mask == LANE_MASK | MARK_MASK => {
            Selector::Lane(Lanes::MOST.iter().find(|lane| lane_mark(*lane) == mark)?)
        }
        _ => return None,
    };
    (message.header.action == RuleAction::ToTable).then_some(Rule { family, priority, selector, table })
}

#[cfg(test)]
mod tests {
    use tombolo_agent_core::desired::{PRIORITY_IN, PRIORITY_LANE, PRIORITY_OUT, TABLE_IN, TABLE_OUT};
    use tombolo_proto::model::{DeviceNumber, Lane};

    use super::*;

    fn rules() -> BTreeSet<Rule> {
        let device = Selector::Device(DeviceNumber::new(5).unwrap());
        let lane = Selector::Lane(Lane::new(3).unwrap());
        Family::ALL
            .into_iter()
            .flat_map(|family| {
                [
                    Rule { family, priority: PRIORITY_OUT, selector: Selector::NotMark, table: TABLE_OUT },
                    Rule { family, priority: PRIORITY_IN, selector: device.clone(), table: TABLE_IN },
                    Rule { family, priority: PRIORITY_LANE, selector: lane.clone(), table: TABLE_OUT + 3 },
                ]
            })
            .collect()
    }

    #[test]
    fn what_is_written_is_read_back() {
        for rule in rules() {
            assert_eq!(parse(&message(&rule)), Some(rule));
        }
    }

    #[test]
    fn the_second_diff_is_empty_and_doubles_go() {
        let actual = |rules: &BTreeSet<Rule>| -> Actual {
            rules.iter().map(|rule| (Some(rule.clone()), message(rule))).collect()
        };
        assert_eq!(diff(&rules(), actual(&rules())), Diff::default());
        let mut twice = actual(&rules());
        twice.extend(actual(&rules()));
        assert_eq!(diff(&rules(), twice).remove.len(), rules().len());
        assert_eq!(diff(&BTreeSet::new(), actual(&rules())).remove.len(), rules().len());
    }
}
