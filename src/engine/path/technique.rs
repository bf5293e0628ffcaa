//! Which punch can work between two NATs, and what it takes (`research/nat.md` sections 2.2 and 5.4).
//!
//! A plain punch needs one port that the other side knows. Where there is none, several sockets or many ports take its place:
//!
//! | one side | other side | how |
//! |---|---|---|
//! | counts ports | keeps one port, or | it opens 8 sockets, learns their ports from STUN requests sent just before and |
//! | | filters by address | after, and tells them; the other side tries those few |
//! | draws from a block | the same | it opens 32 sockets and tells the block; the other side tries ports of it |
//! | draws from all ports | the same | it opens 256 sockets; the other side tries up to 2,048 of all ports |
//! | counts | counts | each sends to a row of the other's next ports, one with stride 1, one with stride 2 |
//! | draws from a block | draws from a block | each sends from 32 sockets to many ports of the other's block |
//! | counts | draws from a block | one row of 64 flows into the block, 37 sockets towards each of those 64 |
//!
//! Whoever opens must be able to let the other in: either that one keeps one port, or the opener filters by address only.

use crate::engine::path::reason::{NatView, hopeless};
use crate::wire::nat::PortModel;
use crate::wire::probe::Role;

/// Sockets whose ports are predicted one by one.
pub(crate) const COUNTED_SOCKETS: u16 = 8;
/// Sockets that draw from a block.
pub(crate) const BLOCK_SOCKETS: u16 = 32;
/// Sockets that draw from all ports.
pub(crate) const RANDOM_SOCKETS: u16 = 256;
/// Ports tried at most: twice 1,024, which finds one of 256 sockets in 64,512 ports with 99.97 %.
pub(crate) const MOST_SCANNED: usize = 2048;
/// Flows of one side when both count, at least and at most.
pub(crate) const STRIDE_FLOWS: u16 = 96;
pub(crate) const MOST_STRIDE_FLOWS: u16 = 160;
/// Flows of one side when both draw from blocks.
pub(crate) const GRID_FLOWS: u16 = 1900;
/// Flows of the counting side into the other's block.
pub(crate) const ROW: u16 = 64;
/// Sockets of the drawing side against a counting one: 4.6 · 512 / 64 finds one of 512 ports with 99 %.
pub(crate) const GUESSING_SOCKETS: u16 = 37;
/// Blocks wider than this, on average of both sides, are not worth a grid: fewer than nine in ten would meet.
const GRID_WIDEST: u32 = 1250;
/// And for one side's block against a counting one.
const GUESS_WIDEST: u32 = 1100;

/// What this node is to do, if a punch with many sockets or ports has a chance where a plain one has none.
pub(crate) fn my_role(mine: &NatView, theirs: &NatView) -> Option<Role> {
    if mine.udp == Some(false) || theirs.udp == Some(false) || !hopeless(mine, theirs) {
        return None;
    }
    let (i_open, they_open) = (price_of_opening(mine, theirs), price_of_opening(theirs, mine));
    match (i_open, they_open) {
        (Some(mine), Some(theirs)) => Some(if mine <= theirs { Role::Opens } else { Role::Scans }),
        (Some(_), None) => Some(Role::Opens),
        (None, Some(_)) => Some(Role::Scans),
        (None, None) => both_hard(mine, theirs),
    }
}

/// Sockets that this role needs here, and whether the role can be played with that knowledge of this node's own NAT.
pub(crate) fn sockets_for(role: Role, mine: Option<PortModel>) -> u16 {
    match role {
        Role::Opens => match mine {
            Some(PortModel::Sequential { .. } | PortModel::Preserving) => COUNTED_SOCKETS,
            Some(PortModel::Block { .. }) => BLOCK_SOCKETS,
            Some(PortModel::Random | PortModel::Unknown) | None => RANDOM_SOCKETS,
        },
        Role::Strides => COUNTED_SOCKETS + 1,
        Role::Grid => BLOCK_SOCKETS,
        Role::Counts => 3,
        Role::Guesses => GUESSING_SOCKETS,
        Role::Scans | Role::Busy | Role::Unknown => 0,
    }
}

/// How many sockets it takes `opener` to be found by `other`; None: it cannot let it in.
fn price_of_opening(opener: &NatView, other: &NatView) -> Option<u16> {
    let lets_in = !other.is_hard() || !opener.filters_ports();
    (opener.is_hard() && lets_in).then(|| sockets_for(Role::Opens, opener.ports))
}

/// Both pick new ports and filter by port.
fn both_hard(mine: &NatView, theirs: &NatView) -> Option<Role> {
    use PortModel::{Block, Sequential};
    let width = |low: u16, high: u16| u32::from(high.saturating_sub(low)) + 1;
    // What is sent to one address must get a port of its own each time.
    if !mine.maps_by_port() || !theirs.maps_by_port() {
        return None;
    }
    match (mine.ports?, theirs.ports?) {
        (Sequential { .. }, Sequential { .. }) => Some(Role::Strides),
        (Block { low: a, high: b }, Block { low: c, high: d }) => {
            (width(a, b) * width(c, d) <= GRID_WIDEST * GRID_WIDEST).then_some(Role::Grid)
        }
        (Sequential { .. }, Block { low, high }) => (width(low, high) <= GUESS_WIDEST).then_some(Role::Counts),
        (Block { low, high }, Sequential { .. }) => (width(low, high) <= GUESS_WIDEST).then_some(Role::Guesses),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::path::reason::behaviour::{ADDRESS_AND_PORT_DEPENDENT, ADDRESS_DEPENDENT, ENDPOINT_INDEPENDENT};

    const SEQ: Option<PortModel> = Some(PortModel::Sequential { step: 1, per_second: 200 });
    const BLOCK: Option<PortModel> = Some(PortModel::Block { low: 20_000, high: 20_511 });
    const WIDE: Option<PortModel> = Some(PortModel::Block { low: 20_000, high: 22_047 });
    const RANDOM: Option<PortModel> = Some(PortModel::Random);

    fn nat(mapping: &str, filtering: &str, ports: Option<PortModel>) -> NatView {
        NatView { mapping: Some(mapping.into()), filtering: Some(filtering.into()), udp: Some(true), ports }
    }

    fn hard(ports: Option<PortModel>) -> NatView {
        nat(ADDRESS_AND_PORT_DEPENDENT, ADDRESS_AND_PORT_DEPENDENT, ports)
    }

    #[test]
    fn each_row_of_the_table_has_its_roles() {
        let easy = nat(ENDPOINT_INDEPENDENT, ADDRESS_AND_PORT_DEPENDENT, None);
        let lenient = nat(ADDRESS_AND_PORT_DEPENDENT, ADDRESS_DEPENDENT, RANDOM);
        let rows = [
            (hard(SEQ), easy.clone(), Some(Role::Opens)),
            (hard(BLOCK), easy.clone(), Some(Role::Opens)),
            (hard(RANDOM), easy.clone(), Some(Role::Opens)),
            (hard(None), easy.clone(), Some(Role::Opens)),
            (lenient.clone(), hard(RANDOM), Some(Role::Opens)),
            (hard(SEQ), hard(SEQ), Some(Role::Strides)),
            (hard(BLOCK), hard(BLOCK), Some(Role::Grid)),
            (hard(SEQ), hard(BLOCK), Some(Role::Counts)),
            (hard(WIDE), hard(WIDE), None),
            (hard(SEQ), hard(WIDE), None),
            (hard(RANDOM), hard(RANDOM), None),
            (hard(RANDOM), hard(SEQ), None),
            (hard(RANDOM), hard(BLOCK), None),
            (nat(ADDRESS_DEPENDENT, ADDRESS_AND_PORT_DEPENDENT, SEQ), hard(SEQ), None),
        ];
        for (a, b, role) in rows {
            assert_eq!(my_role(&a, &b), role, "{a:?} × {b:?}");
            assert_eq!(my_role(&b, &a), role.map(Role::counterpart), "{b:?} × {a:?}");
        }
    }

    #[test]
    fn of_two_that_could_open_the_cheaper_one_does() {
        let counting = nat(ADDRESS_AND_PORT_DEPENDENT, ADDRESS_DEPENDENT, SEQ);
        let drawing = nat(ADDRESS_AND_PORT_DEPENDENT, ADDRESS_DEPENDENT, RANDOM);
        assert_eq!(my_role(&counting, &drawing), Some(Role::Opens));
        assert_eq!(my_role(&drawing, &counting), Some(Role::Scans));
    }

    #[test]
    fn what_a_plain_punch_does_needs_no_more() {
        let easy = nat(ENDPOINT_INDEPENDENT, ADDRESS_AND_PORT_DEPENDENT, None);
        let lenient = nat(ENDPOINT_INDEPENDENT, ADDRESS_DEPENDENT, None);
        for (a, b) in [(easy.clone(), easy.clone()), (lenient, hard(RANDOM)), (NatView::default(), hard(RANDOM))] {
            assert_eq!(my_role(&a, &b), None);
        }
        let blocked = NatView { udp: Some(false), ..easy.clone() };
        assert_eq!(my_role(&blocked, &hard(SEQ)), None);
    }
}
