//! Addresses a node may be reached at.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::engine::io::LocalAddress;
use crate::engine::path::reason::NatView;
use crate::wire::probe::{Candidate, CandidateKind, MAX_CANDIDATES};

/// The candidates to tell peers. An address that is the machine's own and also what servers see is listed as both: there is no
/// NAT. Mapped and reflexive first, then the machine's own addresses, at most [`MAX_CANDIDATES`].
#[must_use]
pub fn gather(
    mapped: Option<SocketAddr>,
    reflexive: &[SocketAddr],
    local: &[LocalAddress],
    port_v4: Option<u16>,
    port_v6: Option<u16>,
    mesh: &[IpNet],
) -> Vec<Candidate> {
    let hosts = local.iter().filter_map(|a| {
        let port = if a.ip.is_ipv4() { port_v4 } else { port_v6 }?;
        Some(SocketAddr::new(a.ip, port))
    });
    let mut out: Vec<Candidate> = Vec::new();
    // A NAT that gives us other ports may have ours forwarded by hand.
    let several = reflexive.iter().filter(|seen| seen.is_ipv4()).count() > 1;
    let by_hand =
        |seen: &SocketAddr| port_v4.filter(|_| seen.is_ipv4() && several).map(|port| SocketAddr::new(seen.ip(), port));
    let forwarded = reflexive.iter().filter_map(by_hand).map(|addr| (CandidateKind::Reflexive, addr));
    let mapped = mapped.into_iter().map(|addr| (CandidateKind::Mapped, addr));
    let reflexive = reflexive.iter().map(|addr| (CandidateKind::Reflexive, *addr));
    for (kind, addr) in mapped.chain(reflexive).chain(forwarded).chain(hosts.map(|addr| (CandidateKind::Host, addr))) {
        if out.len() < MAX_CANDIDATES && usable(&addr, mesh) && !out.contains(&Candidate { addr, kind }) {
            out.push(Candidate { addr, kind });
        }
    }
    out
}

/// Whether there are IPv4 and IPv6 ones among them.
pub(crate) fn families(candidates: &[Candidate]) -> (bool, bool) {
    let any = |v4: bool| candidates.iter().any(|c| c.addr.is_ipv4() == v4);
    (any(true), any(false))
}

/// Whether an address may be probed at all: a unicast address outside the mesh (the tunnel never runs inside itself).
#[must_use]
pub fn usable(addr: &SocketAddr, mesh: &[IpNet]) -> bool {
    let ip = addr.ip().to_canonical();
    let special = match ip {
        IpAddr::V4(v4) => v4.is_broadcast() || v4.octets()[0] == 0 || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    addr.port() != 0
        && !special
        && !ip.is_loopback()
        && !ip.is_multicast()
        && !ip.is_unspecified()
        && !mesh.iter().any(|net| net.contains(&ip))
}

/// Whether `addr` is on a network this machine is attached to.
#[must_use]
pub fn on_link(addr: &SocketAddr, local: &[LocalAddress]) -> bool {
    local.iter().any(|a| IpNet::new(a.ip, a.prefix_len).is_ok_and(|net| net.contains(&addr.ip())))
}

/// The candidates that let everybody in: mapped ports, all behind a NAT that filters nothing, and public addresses that are
/// the machine's own, unless they are known to be filtered.
pub(crate) fn open_among(candidates: &[Candidate], nat: &NatView) -> Vec<SocketAddr> {
    let is = |kind: CandidateKind, addr: &SocketAddr| candidates.iter().any(|c| c.kind == kind && c.addr == *addr);
    let of_kind = |kind: CandidateKind| candidates.iter().filter(move |c| c.kind == kind).map(|c| c.addr);
    let mut open: Vec<SocketAddr> = of_kind(CandidateKind::Mapped).collect();
    if !nat.is_hard() {
        let filters_nothing = nat.filters_nothing();
        let public = |addr: &SocketAddr| nat.filtering.is_none() && is(CandidateKind::Host, addr);
        open.extend(of_kind(CandidateKind::Reflexive).filter(|addr| filters_nothing || public(addr)));
    }
    open
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unicast_addresses_outside_the_mesh_are_usable() {
        let mesh: Vec<IpNet> = vec!["100.71.0.0/16".parse().unwrap()];
        for good in ["203.0.113.7:1", "192.168.1.2:50000", "[2001:db8::1]:9", "100.64.3.4:5"] {
            assert!(usable(&good.parse().unwrap(), &mesh), "{good}");
        }
        for bad in [
            "203.0.113.7:0",
            "100.71.0.2:5",
            "127.0.0.1:5",
            "224.0.0.1:5",
            "255.255.255.255:5",
            "0.0.0.0:5",
            "169.254.1.1:5",
            "[fe80::1]:5",
            "[::1]:5",
            "[ff02::1]:5",
            "[::ffff:100.71.0.2]:5",
        ] {
            assert!(!usable(&bad.parse().unwrap(), &mesh), "{bad}");
        }
    }

    #[test]
    fn who_lets_everybody_in() {
        let candidate = |addr: &str, kind| Candidate { addr: addr.parse().unwrap(), kind };
        let seen = candidate("203.0.113.7:1", CandidateKind::Reflexive);
        let own = candidate("203.0.113.7:1", CandidateKind::Host);
        let mapped = candidate("100.64.0.9:2", CandidateKind::Mapped);
        let nat = |mapping: Option<&str>, filtering: Option<&str>| NatView {
            mapping: mapping.map(Into::into),
            filtering: filtering.map(Into::into),
            ..NatView::default()
        };
        let (kept, changing) = (Some("endpoint-independent"), Some("address-and-port-dependent"));
        assert_eq!(open_among(&[seen, mapped], &nat(changing, changing)), [mapped.addr]);
        assert_eq!(open_among(&[seen], &nat(kept, kept)), [seen.addr], "full cone");
        assert_eq!(open_among(&[seen], &nat(changing, kept)), [], "which port would it be?");
        assert_eq!(open_among(&[seen, own], &nat(kept, None)), [seen.addr], "no NAT, and no firewall known");
        assert_eq!(open_among(&[seen, own], &nat(kept, changing)), [], "a firewall");
        assert_eq!(open_among(&[seen], &nat(kept, None)), []);
    }

    #[test]
    fn the_list_is_capped_deduplicated_and_reflexive_first() {
        let local: Vec<LocalAddress> =
            (1..40).map(|i| LocalAddress { ip: IpAddr::from([10, 0, 0, i]), prefix_len: 24 }).collect();
        let reflexive: SocketAddr = "203.0.113.7:50112".parse().unwrap();
        let list = gather(None, &[reflexive, reflexive], &local, Some(50112), None, &[]);
        assert_eq!(list.len(), MAX_CANDIDATES);
        assert_eq!(list[0], Candidate { addr: reflexive, kind: CandidateKind::Reflexive });
        assert_eq!(list.iter().filter(|c| c.kind == CandidateKind::Reflexive).count(), 1);
    }
}
