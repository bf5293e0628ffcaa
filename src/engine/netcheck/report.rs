//! What the answers show: the report, and the judgements of RFC 5780 in it.

use super::*;

impl Netcheck {
    /// What was found out, as far as it is known now. Port mapping and the coordinator's round trips are not its business.
    #[must_use]
    pub fn finish(&self) -> local::Netcheck {
        let first_round = &self.questions[..self.servers.len()];
        let mut reflexive: Vec<SocketAddr> = Vec::new();
        let mut servers = Vec::new();
        for question in first_round {
            let mapped = question.answer().map(|r| r.mapped);
            if let Some(mapped) = mapped.filter(|m| !reflexive.contains(m)) {
                reflexive.push(mapped);
            }
            let rtt_ms = match question.outcome {
                Outcome::Answered { rtt, .. } => Some(rtt.as_secs_f64() * 1e3),
                Outcome::Pending | Outcome::Unable | Outcome::Silence => None,
            };
            servers.push(NetcheckServer { server: question.to, rtt_ms, reflexive: mapped });
        }
        let answered = |ipv4: bool| first_round.iter().any(|q| q.to.is_ipv4() == ipv4 && q.answer().is_some());
        let ipv4 = answered(true);
        let ipv6 = answered(false);
        // What a person calls "my NAT" is the IPv4 one; only without IPv4 the report is about IPv6.
        let about_ipv4 = ipv4 || !ipv6;
        let mapping = self.mapping(about_ipv4);
        let filtering = self.filtering(about_ipv4);
        let port_model = if about_ipv4 { self.port_model(mapping) } else { None };
        local::Netcheck {
            schema: 1,
            udp: ipv4 || ipv6,
            mapping: mapping.map(|b| b.name().to_owned()),
            filtering: filtering.map(|b| b.name().to_owned()),
            port_model,
            hairpin: self.hairpin.as_ref().map(|h| h.seen),
            double_nat: self.double_nat(&reflexive),
            nat_depth: None,
            port_mapping: None,
            punching: None,
            port_mapper: None,
            udp_lifetime: None,
            ipv6,
            coordinator_rtt_ms: None,
            relay_rtt_ms: None,
            meaning: self.meaning(ipv4 || ipv6, about_ipv4, &reflexive, mapping, filtering, port_model),
            reflexive,
            servers,
        }
    }

    pub(super) fn port_model(&self, mapping: Option<Behaviour>) -> Option<PortModel> {
        let sample = |q: &Question| {
            let local = self.local_ports.get(&q.slot).copied().unwrap_or(0);
            Some(Sample { local, external: q.answer()?.mapped.port() })
        };
        if mapping? == Behaviour::EndpointIndependent {
            // One mapping tells only whether its port was kept.
            let one = self.questions.iter().filter(|q| q.slot == SocketSlot::MappingV4).find_map(sample)?;
            return (one.local == one.external).then_some(PortModel::Preserving);
        }
        let burst = |numbers: std::ops::Range<u8>| -> Vec<Sample> {
            let of_burst = |q: &&Question| matches!(q.slot, SocketSlot::Burst(n) if numbers.contains(&n));
            self.questions.iter().filter(of_burst).filter_map(sample).collect()
        };
        ports::classify(&burst(0..BURST), &burst(BURST..2 * BURST), BURST_GAP)
    }

    /// True: the address "outside" is itself a carrier's (RFC 6598), so there is another NAT behind.
    pub(super) fn double_nat(&self, reflexive: &[SocketAddr]) -> Option<bool> {
        let shared = |ip: &IpAddr| matches!(ip, IpAddr::V4(v4) if v4.octets()[0] == 100 && v4.octets()[1] & 0xc0 == 64);
        let translated = reflexive.iter().any(|r| r.is_ipv4() && !self.local.contains(&r.ip()));
        (translated && self.local.iter().any(shared)).then_some(true)
    }

    /// RFC 5780, section 4.3, from whatever was asked on the mapping socket.
    pub(super) fn mapping(&self, ipv4: bool) -> Option<Behaviour> {
        let seen: Vec<(SocketAddr, SocketAddr)> = self
            .questions
            .iter()
            .filter(|q| matches!(q.slot, SocketSlot::MappingV4 | SocketSlot::MappingV6) && q.to.is_ipv4() == ipv4)
            .filter_map(|q| Some((q.to, q.answer()?.mapped)))
            .collect();
        let pairs = || seen.iter().enumerate().flat_map(|(i, a)| seen[i + 1..].iter().map(move |b| (a, b)));
        let same_ip = |a: &SocketAddr, b: &SocketAddr| a.ip() == b.ip();
        if pairs().all(|(a, b)| a.1 == b.1) {
            // One address asked on two ports says nothing about other addresses.
            return pairs().any(|(a, b)| !same_ip(&a.0, &b.0)).then_some(Behaviour::EndpointIndependent);
        }
        let one_ip_two_ports = || pairs().filter(|(a, b)| same_ip(&a.0, &b.0));
        if one_ip_two_ports().next().is_some() && one_ip_two_ports().all(|(a, b)| a.1 == b.1) {
            return Some(Behaviour::AddressDependent);
        }
        // Known to depend on the port too, or not known: then the worse.
        Some(Behaviour::AddressAndPortDependent)
    }

    /// RFC 5780, section 4.4.
    pub(super) fn filtering(&self, ipv4: bool) -> Option<Behaviour> {
        let outcome = |change: Change| {
            let mut asked = self.questions.iter().filter(|q| {
                matches!(q.slot, SocketSlot::FilteringV4 | SocketSlot::FilteringV6) && q.to.is_ipv4() == ipv4
            });
            asked.find(|q| q.change == change).map(|q| q.outcome)
        };
        // Silence says something only if the plain question was answered.
        let Some(Outcome::Answered { .. }) = outcome(Change::default()) else { return None };
        let other_port = outcome(Change { ip: false, port: true });
        match (outcome(Change { ip: true, port: true }), other_port) {
            (Some(Outcome::Answered { .. }), _) => Some(Behaviour::EndpointIndependent),
            (Some(Outcome::Silence), Some(Outcome::Answered { .. })) => Some(Behaviour::AddressDependent),
            (_, Some(Outcome::Silence)) => Some(Behaviour::AddressAndPortDependent),
            (_, _) => None,
        }
    }
}
