//! What the report means for its reader, in plain words.

use std::fmt::Write as _;

use super::*;

impl Netcheck {
    pub(super) fn meaning(
        &self,
        udp: bool,
        ipv4: bool,
        reflexive: &[SocketAddr],
        mapping: Option<Behaviour>,
        filtering: Option<Behaviour>,
        port_model: Option<PortModel>,
    ) -> String {
        if self.servers.is_empty() {
            return "No STUN server is known, so nothing can be said about the NAT.".to_owned();
        }
        if !udp {
            return "UDP does not reach any STUN server and come back: peers are reached by TCP where that works, and through the relay.".to_owned();
        }
        let no_nat = reflexive.iter().any(|r| r.is_ipv4() == ipv4 && self.local.contains(&r.ip()));
        let mut text = match (no_nat, mapping) {
            (true, _) if filtering == Some(Behaviour::EndpointIndependent) => {
                "There is no NAT and no firewall in the way: direct connections work with all peers."
            }
            (true, _) => "There is no NAT: direct connections work with most peers.",
            (false, Some(Behaviour::EndpointIndependent)) if filtering == Some(Behaviour::EndpointIndependent) => {
                "Your NAT keeps one port for all destinations and lets everybody in: direct connections work with all peers."
            }
            (false, Some(Behaviour::EndpointIndependent)) => {
                "Your NAT keeps one port for all destinations: direct connections work with most peers."
            }
            (false, Some(Behaviour::AddressDependent | Behaviour::AddressAndPortDependent))
                if port_model.is_some_and(|model| sockets_for(Role::Opens, Some(model)) <= self.extra_sockets) =>
            {
                match port_model {
                    Some(PortModel::Random) => {
                        "Your NAT uses another port for each destination, drawn at random: direct connections work with \
                         peers whose NAT keeps its port, at the price of up to 2,600 small packets; the others are reached \
                         through the relay."
                    }
                    Some(PortModel::Block { .. }) => {
                        "Your NAT uses another port for each destination, out of a small block: direct connections work \
                         with most peers, at the price of some hundred small packets."
                    }
                    _ => {
                        "Your NAT uses another port for each destination, but in an order that can be foreseen: direct \
                         connections work with most peers."
                    }
                }
            }
            (false, Some(Behaviour::AddressDependent | Behaviour::AddressAndPortDependent)) => {
                "Your NAT uses another port for each destination: direct connections work only with peers whose NAT is \
                 easier, the others are reached through the relay."
            }
            (false, None) => {
                "The servers asked have too few addresses to tell how your NAT chooses ports; peers show whether direct \
                 connections work."
            }
        }
        .to_owned();
        if mapping.is_some_and(|m| m != Behaviour::EndpointIndependent) {
            match port_model {
                Some(PortModel::Sequential { step, per_second }) => {
                    let (way, others) = (if step > 0 { "up" } else { "down" }, per_second);
                    let _ = write!(text, " It counts its ports {way} ({others} connections of others a second).");
                }
                Some(PortModel::Block { low, high }) => {
                    let _ = write!(text, " It takes its ports from about {low} to {high}.");
                }
                Some(PortModel::Random) => text.push_str(" It takes any port."),
                Some(PortModel::Preserving | PortModel::Unknown) | None => {}
            }
        }
        if mapping.is_some() && filtering.is_none() {
            text.push_str(" How it filters is not known: no server could answer from another address.");
        }
        text
    }
}
