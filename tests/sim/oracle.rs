//! Can a plain synchronised punch succeed? By RFC 4787 reasoning alone; shares no code with the engine, nor with the
//! NAT model's tables.
//!
//! A chain of NATs behaves as its worst mapping with its worst filter. That is exact for chains whose outer boxes are
//! endpoint-independent, or both address- and port-dependent; [`crate::scenario`] builds no others.

use crate::nat::{Filtering, Kind, Mapping};
use crate::scenario::{Scenario, Shape};

/// True: a direct path must be found. False: there is none to be found by plain punching.
pub(crate) fn direct_is_possible(s: &Scenario) -> bool {
    let blocked = |chain: &[Kind]| chain.contains(&Kind::Blocked);
    let public = |chain: &[Kind]| chain.iter().all(|kind| *kind == Kind::Public);
    match s.shape {
        Shape::Lan => true,
        _ if blocked(&s.a) || blocked(&s.b) => false,
        _ if s.families().v6() => true, // firewalls only: endpoint-independent on both sides
        Shape::Apart => punchable(worst(&s.a), worst(&s.b)),
        Shape::Carrier if public(&s.a) || public(&s.b) => true, // its own address is the carrier network's
        Shape::Carrier => {
            let with_carrier = |chain: &[Kind]| worst(&[chain, &[s.carrier]].concat());
            let hairpin = matches!(s.carrier, Kind::Rfc4787(kind) if kind.hairpin);
            hairpin && punchable(with_carrier(&s.a), with_carrier(&s.b))
        }
    }
}

type Behaviour = (Mapping, Filtering);

/// `research/nat.md` section 2.1: both EIM, or one side EIF, or one side EIM with a filter no worse than ADF.
fn punchable(a: Behaviour, b: Behaviour) -> bool {
    let open = |(mapping, filtering): Behaviour| {
        filtering == Filtering::Eif || (mapping == Mapping::Eim && filtering <= Filtering::Adf)
    };
    (a.0 == Mapping::Eim && b.0 == Mapping::Eim) || open(a) || open(b)
}

fn worst(chain: &[Kind]) -> Behaviour {
    let one = |kind: &Kind| match kind {
        Kind::Public => (Mapping::Eim, Filtering::Eif),
        Kind::Linux { draws: Some(_), .. } => (Mapping::Apdm, Filtering::Apdf),
        Kind::Linux { .. } => (Mapping::Eim, Filtering::Apdf),
        Kind::Rfc4787(kind) => (kind.mapping, kind.filtering),
        Kind::Blocked => (Mapping::Apdm, Filtering::Apdf),
    };
    chain.iter().map(one).fold((Mapping::Eim, Filtering::Eif), |a, b| (a.0.max(b.0), a.1.max(b.1)))
}
