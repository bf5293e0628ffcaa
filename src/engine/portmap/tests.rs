//! The machine against a model of a router that writes its answers byte by byte.

use std::collections::{BTreeMap, VecDeque};

use super::*;

const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
const OWN: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 7);
const OUTSIDE: [u8; 4] = [100, 64, 0, 9];
const PORT: u16 = 50_112;
const ONE_WAY: Duration = Duration::from_millis(3);
const MINUTE: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct Router {
    pcp: bool,
    nat_pmp: bool,
    upnp: bool,
    /// Datagrams swallowed before the first that is answered.
    deaf_for: usize,
    /// Result code of every PCP MAP.
    pcp_result: u8,
    /// Faults of the first calls for a mapping.
    faults: VecDeque<u16>,
    lifetime_s: u32,
    started: Now,
    outside: [u8; 4],
    /// Inside port → (outside port, nonce if by PCP).
    mappings: BTreeMap<u16, (u16, Option<[u8; 12]>)>,
    requests: Vec<(Now, &'static str)>,
}

enum Event {
    Datagram(Vec<u8>),
    Found(Vec<u8>),
    Fetched(u32, Option<String>),
    Called(u32, Option<String>),
}

struct Rig {
    now: Now,
    machine: PortMapper,
    router: Router,
    events: VecDeque<(Now, Event)>,
    told: Vec<Option<PortMapping>>,
}

fn speaks(pcp: bool, nat_pmp: bool, upnp: bool) -> Router {
    Router { pcp, nat_pmp, upnp, lifetime_s: 7_200, outside: OUTSIDE, ..Router::default() }
}

fn rig(router: Router) -> Rig {
    let mut rig = Rig {
        now: Now(5_000_000),
        machine: PortMapper::new(PORT, Secret32::new([3; 32]), 1),
        router,
        events: VecDeque::new(),
        told: Vec::new(),
    };
    rig.machine.set_gateway(Some(Gateway { router: ROUTER, own: OWN }), rig.now);
    rig
}

impl Router {
    fn answer(&mut self, request: &[u8], now: Now) -> Option<Vec<u8>> {
        let kind = match (request[0], request[1]) {
            (2, 0) => "pcp announce",
            (2, 1) => "pcp map",
            (0, 0) => "nat-pmp address",
            (0, 1) => "nat-pmp map",
            other => panic!("{other:?}"),
        };
        self.requests.push((now, kind));
        if self.deaf_for > 0 {
            self.deaf_for -= 1;
            return None;
        }
        let epoch = u32::try_from(now.since(self.started).as_secs()).unwrap().to_be_bytes();
        match request[0] {
            2 if self.pcp => Some(self.pcp_answer(request, epoch)),
            2 if self.nat_pmp => Some([&[0, 128 + request[1], 0, 1][..], &epoch].concat()),
            0 if self.nat_pmp && request[1] == 0 => Some([&[0, 128, 0, 0][..], &epoch, &self.outside].concat()),
            0 if self.nat_pmp => {
                let inside = u16::from_be_bytes([request[4], request[5]]);
                let life = &request[8..12];
                if life == [0; 4] {
                    self.mappings.remove(&inside);
                    return Some([&[0, 129, 0, 0][..], &epoch, &request[4..6], &[0, 0], life].concat());
                }
                self.mappings.insert(inside, (4_660, None));
                Some(
                    [&[0, 129, 0, 0][..], &epoch, &request[4..6], &[0x12, 0x34], &self.lifetime_s.to_be_bytes()]
                        .concat(),
                )
            }
            _ => None,
        }
    }

    fn pcp_answer(&mut self, request: &[u8], epoch: [u8; 4]) -> Vec<u8> {
        let mut out = request.to_vec();
        out[1] |= 0x80;
        out[8..12].copy_from_slice(&epoch);
        out[12..24].fill(0);
        if request[1] == 0 {
            return out;
        }
        let nonce: [u8; 12] = request[24..36].try_into().unwrap();
        let inside = u16::from_be_bytes([request[40], request[41]]);
        let theirs = self.mappings.get(&inside).and_then(|(_, owner)| *owner).is_some_and(|owner| owner != nonce);
        out[3] = if theirs { 2 } else { self.pcp_result };
        if request[4..8] == [0; 4] {
            self.mappings.remove(&inside);
        } else if out[3] == 0 {
            let wish = u16::from_be_bytes([request[42], request[43]]);
            self.mappings.insert(inside, (wish, Some(nonce)));
            out[4..8].copy_from_slice(&self.lifetime_s.to_be_bytes());
            out[56..60].copy_from_slice(&self.outside);
        }
        out
    }

    fn call(&mut self, action: &Action, now: Now) -> String {
        let name = match action {
            Action::ExternalAddress => "upnp address",
            Action::Add { lifetime_s: 0, .. } => "upnp add for ever",
            Action::Add { .. } => "upnp add",
            Action::Delete { .. } => "upnp delete",
        };
        self.requests.push((now, name));
        let [a, b, c, d] = self.outside;
        match action {
            Action::ExternalAddress => format!("<NewExternalIPAddress>{a}.{b}.{c}.{d}</NewExternalIPAddress>"),
            Action::Add { external_port, internal, .. } => match self.faults.pop_front() {
                Some(code) => format!("<errorCode>{code}</errorCode>"),
                None => {
                    self.mappings.insert(internal.port(), (*external_port, None));
                    "<u:AddPortMappingResponse/>".into()
                }
            },
            Action::Delete { external_port } => {
                self.mappings.retain(|_, (outside, _)| outside != external_port);
                "<u:DeletePortMappingResponse/>".into()
            }
        }
    }

    fn reboot(&mut self, now: Now) {
        self.started = now;
        self.mappings.clear();
    }

    fn count(&self, kind: &str) -> usize {
        self.requests.iter().filter(|(_, k)| *k == kind).count()
    }
}

impl Rig {
    fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            self.carry_out();
            let event = self.events.iter().map(|(at, _)| *at).min();
            let due = self.machine.poll_timeout().into_iter().chain(event).min();
            let Some(at) = due.filter(|at| *at <= end) else { break };
            self.now = self.now.max(at);
            if event.is_some_and(|at| at <= self.now) {
                let (_, event) = self.events.pop_front().unwrap();
                let now = self.now;
                match event {
                    Event::Datagram(bytes) => {
                        self.machine.handle_datagram((ROUTER, pcp::SERVER_PORT).into(), &bytes, now);
                    }
                    Event::Found(bytes) => self.machine.found(ROUTER.into(), &bytes, now),
                    Event::Fetched(id, text) => self.machine.fetched(id, text.as_deref().ok_or("it hangs"), now),
                    Event::Called(id, text) => self.machine.called(id, text.as_deref().ok_or("it hangs"), now),
                }
            } else {
                self.machine.handle_timeout(self.now);
            }
        }
        self.now = end;
    }

    fn carry_out(&mut self) {
        while let Some(output) = self.machine.poll_output() {
            let (arrives, back) = (self.now + ONE_WAY, self.now + ONE_WAY * 2);
            match output {
                Output::Send(bytes) => {
                    if let Some(answer) = self.router.answer(&bytes, arrives) {
                        self.events.push_back((back, Event::Datagram(answer)));
                    }
                }
                Output::Search => {
                    self.router.requests.push((arrives, "upnp search"));
                    if self.router.upnp {
                        let answer = "HTTP/1.1 200 OK\r\nST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n\
                                      LOCATION: http://192.168.1.1:5000/d.xml\r\n\r\n";
                        self.events.push_back((back, Event::Found(answer.into())));
                    }
                }
                Output::Fetch(id, url) => {
                    assert_eq!((url.address.to_string().as_str(), url.path.as_str()), ("192.168.1.1:5000", "/d.xml"));
                    let text = "<service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:1</serviceType>\
                                <controlURL>/c</controlURL></service>";
                    self.events.push_back((back, Event::Fetched(id, Some(text.into()))));
                }
                Output::Call(id, _, action) => {
                    let text = self.router.upnp.then(|| self.router.call(&action, arrives));
                    self.events.push_back((back, Event::Called(id, text)));
                }
                Output::Mapped(mapping) => self.told.push(mapping),
            }
        }
    }

    fn held(&self) -> Option<String> {
        self.told.last().cloned().flatten().map(|m| format!("{} {}", m.protocol, m.external))
    }

    fn states(&self) -> Vec<String> {
        self.machine.status(self.now).protocols.into_iter().map(|p| p.state).collect()
    }
}

#[test]
fn pcp_grants_and_nothing_else_is_asked() {
    let mut rig = rig(speaks(true, true, true));
    rig.run_for(Duration::from_millis(10));
    assert_eq!(rig.held().unwrap(), "pcp 100.64.0.9:50112");
    rig.run_for(Duration::from_secs(10));
    assert_eq!(rig.router.requests.len(), 1, "{:?}", rig.router.requests);
    assert_eq!(rig.states(), ["granted", "not-asked", "not-asked"]);
    rig.machine.survey(rig.now);
    rig.run_for(Duration::from_secs(1));
    assert_eq!(rig.states(), ["granted", "answers", "answers"]);
    assert_eq!(rig.router.mappings.len(), 1, "a survey maps nothing");
    assert!(rig.machine.is_quiet());
}

#[test]
fn an_older_router_is_asked_by_nat_pmp_and_the_rest_by_upnp() {
    let mut old = rig(speaks(false, true, true));
    old.run_for(Duration::from_millis(30));
    assert_eq!(old.held().unwrap(), "nat-pmp 100.64.0.9:4660");
    assert_eq!(old.router.count("upnp search"), 0);
    let mut other = rig(speaks(false, false, true));
    other.run_for(Duration::from_millis(1_600));
    assert_eq!(other.held().unwrap(), "upnp 100.64.0.9:50112");
    assert_eq!(other.states(), ["silent", "silent", "granted"]);
}

#[test]
fn lost_datagrams_are_repeated() {
    for deaf_for in 1..3 {
        let mut rig = rig(Router { deaf_for, ..speaks(true, false, false) });
        rig.run_for(Duration::from_millis(800));
        assert_eq!(rig.held().unwrap(), "pcp 100.64.0.9:50112", "{deaf_for}");
    }
}

#[test]
fn silence_is_met_with_patience() {
    let mut rig = rig(speaks(false, false, false));
    rig.run_for(Duration::from_secs(10));
    assert_eq!(rig.states(), ["silent", "silent", "silent"]);
    assert!(rig.machine.status(rig.now).reason.unwrap().contains("neither PCP nor"));
    assert_eq!(rig.told, [None], "that there is none is worth knowing, once");
    let first = rig.router.requests.len();
    assert_eq!(first, 8, "{:?}", rig.router.requests);
    // After 1, 5 and every 30 minutes.
    rig.run_for(MINUTE * 60 * 24);
    let rounds = rig.router.requests.len() / first;
    assert!((48..=51).contains(&rounds), "{rounds} rounds a day");
    // Somebody switches it on, and plugs a cable.
    rig.router.pcp = true;
    rig.machine.nudge(rig.now);
    rig.run_for(Duration::from_millis(10));
    assert!(rig.held().is_some());
}

#[test]
fn a_refusal_leads_to_the_next_protocol_and_is_told() {
    let mut first = rig(Router { pcp_result: 2, ..speaks(true, true, false) });
    first.run_for(Duration::from_millis(30));
    assert_eq!(first.held().unwrap(), "nat-pmp 100.64.0.9:4660");
    let status = first.machine.status(first.now);
    assert_eq!(status.protocols[0].text.as_deref(), Some("it does not allow it"));
    let mut second = rig(Router { faults: [606].into(), ..speaks(false, false, true) });
    second.run_for(Duration::from_secs(5));
    assert_eq!((second.held(), second.states()[2].as_str()), (None, "refused"));
    assert_eq!(second.machine.status(second.now).reason.as_deref(), Some("the router refuses"));
}

#[test]
fn it_is_renewed_at_half_its_life() {
    for (router, map) in [
        (speaks(true, false, false), "pcp map"),
        (speaks(false, true, false), "nat-pmp map"),
        (speaks(false, false, true), "upnp add"),
    ] {
        let mut rig = rig(router);
        rig.run_for(MINUTE);
        let before = rig.router.count(map);
        rig.run_for(MINUTE * 58);
        assert_eq!(rig.router.count(map), before, "{map}");
        rig.run_for(MINUTE * 2);
        assert_eq!(rig.router.count(map), before + 1, "{map}");
        rig.run_for(MINUTE * 60 * 10);
        assert_eq!(rig.router.count(map), before + 11, "{map}");
        assert_eq!(rig.told.len(), 1, "{:?}", rig.told);
    }
}

#[test]
fn a_mapping_that_cannot_be_renewed_is_taken_back_when_it_ends() {
    let mut rig = rig(speaks(true, false, false));
    rig.run_for(MINUTE);
    rig.router.pcp = false;
    rig.run_for(MINUTE * 117);
    assert!(rig.held().is_some());
    assert!(rig.router.count("pcp map") < 60, "{}", rig.router.count("pcp map"));
    rig.run_for(MINUTE * 3);
    assert_eq!(rig.held(), None);
    rig.router.pcp = true;
    rig.run_for(MINUTE * 30);
    assert!(rig.held().is_some());
}

#[test]
fn a_router_that_rebooted_is_noticed_by_its_epoch() {
    for (router, map) in [(speaks(true, false, false), "pcp map"), (speaks(false, true, false), "nat-pmp map")] {
        let mut rig = rig(router);
        rig.run_for(MINUTE * 10);
        let maps = rig.router.count(map);
        rig.router.reboot(rig.now);
        rig.run_for(CHECK_EVERY + Duration::from_secs(1));
        assert_eq!(rig.router.mappings.len(), 1, "{map}");
        assert_eq!(rig.router.count(map), maps + 1);
        // It says so itself, unasked, and is asked at once.
        rig.router.reboot(rig.now);
        let announcement: &[u8] = if map == "pcp map" {
            &[2, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        } else {
            &[0, 128, 0, 0, 0, 0, 0, 0, 100, 64, 0, 9]
        };
        rig.run_for(Duration::from_secs(6));
        rig.machine.handle_datagram((ROUTER, pcp::SERVER_PORT).into(), announcement, rig.now);
        rig.run_for(Duration::from_millis(10));
        assert_eq!((rig.router.mappings.len(), rig.router.count(map)), (1, maps + 2), "{map}");
        // However often somebody says it, it does not lead to a storm.
        for i in 0..200u32 {
            let mut lie = announcement.to_vec();
            let at = if lie[0] == 2 { 8 } else { 4 };
            lie[at..at + 4].copy_from_slice(&(i % 2 * 1_000_000).to_be_bytes());
            rig.machine.handle_datagram((ROUTER, pcp::SERVER_PORT).into(), &lie, rig.now);
            rig.run_for(Duration::from_millis(50));
        }
        assert!(rig.router.count(map) <= maps + 5, "{}", rig.router.count(map) - maps);
    }
}

#[test]
fn a_reboot_right_after_another_event_is_noticed_soon_too() {
    let mut rig = rig(speaks(true, false, false));
    rig.run_for(MINUTE);
    rig.machine.nudge(rig.now);
    rig.run_for(Duration::from_secs(1));
    rig.router.reboot(rig.now);
    let announcement = [2, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    rig.machine.handle_datagram((ROUTER, pcp::SERVER_PORT).into(), &announcement, rig.now);
    assert_eq!(rig.router.mappings.len(), 0);
    rig.run_for(EVENT_GAP);
    assert_eq!(rig.router.mappings.len(), 1);
}

#[test]
fn a_new_address_outside_is_told() {
    let mut rig = rig(speaks(false, true, false));
    rig.run_for(MINUTE);
    rig.router.outside = [203, 0, 113, 7];
    rig.machine.nudge(rig.now);
    rig.run_for(Duration::from_millis(10));
    assert_eq!(rig.held().unwrap(), "nat-pmp 203.0.113.7:4660");
}

#[test]
fn at_the_end_the_mapping_goes() {
    for router in [speaks(true, false, false), speaks(false, true, false), speaks(false, false, true)] {
        let mut rig = rig(router);
        rig.run_for(MINUTE);
        assert_eq!(rig.router.mappings.len(), 1);
        rig.machine.stop(rig.now);
        rig.run_for(Duration::from_millis(20));
        assert!(rig.machine.is_stopped(rig.now));
        assert_eq!(rig.router.mappings.len(), 0);
    }
    // A router that does not answer does not hold it up.
    let mut gone = rig(speaks(true, false, false));
    gone.run_for(MINUTE);
    gone.router.pcp = false;
    gone.machine.stop(gone.now);
    assert!(!gone.machine.is_stopped(gone.now));
    gone.run_for(STOP_PATIENCE);
    assert!(gone.machine.is_stopped(gone.now));
    assert_eq!(gone.machine.poll_timeout(), None);
}

#[test]
fn who_was_killed_gets_the_same_mapping_back() {
    let mut rig = rig(speaks(true, false, false));
    rig.run_for(MINUTE);
    for (secret, granted) in [([3; 32], true), ([4; 32], false)] {
        rig.machine = PortMapper::new(PORT, Secret32::new(secret), 2);
        rig.told.clear();
        rig.machine.set_gateway(Some(Gateway { router: ROUTER, own: OWN }), rig.now);
        rig.run_for(MINUTE);
        assert_eq!(rig.held().is_some(), granted, "a stranger's nonce is refused, ours is not");
    }
}

#[test]
fn upnp_routers_with_wishes_of_their_own() {
    let mut taken = rig(Router { faults: [718, 718].into(), ..speaks(false, false, true) });
    taken.run_for(Duration::from_secs(3));
    let held = taken.held().unwrap();
    assert!(held.starts_with("upnp 100.64.0.9:") && !held.ends_with(":50112"), "{held}");
    let mut permanent = rig(Router { faults: [725].into(), ..speaks(false, false, true) });
    permanent.run_for(Duration::from_secs(3));
    assert_eq!(permanent.router.count("upnp add for ever"), 1);
    assert_eq!(permanent.machine.status(permanent.now).lifetime_s, None);
    let mut full = rig(Router { faults: [718; 9].into(), ..speaks(false, false, true) });
    full.run_for(Duration::from_secs(10));
    assert_eq!((full.held(), full.router.count("upnp add")), (None, 4));
}

#[test]
fn only_the_router_is_believed() {
    let mut rig = rig(speaks(false, false, false));
    rig.run_for(Duration::from_millis(1));
    let mut request = rig.machine.pcp_request(Gateway { router: ROUTER, own: OWN }, LIFETIME_S);
    let answer = speaks(true, false, false).pcp_answer(&request, [0; 4]);
    for from in ["192.168.1.1:5350", "192.168.1.2:5351", "[::ffff:192.168.1.1]:5351"] {
        rig.machine.handle_datagram(from.parse().unwrap(), &answer, rig.now);
    }
    // From the right address, but about another mapping, another port, or an address that is none.
    for at in [24, 40] {
        let mut other = answer.clone();
        other[at] ^= 1;
        rig.machine.handle_datagram((ROUTER, pcp::SERVER_PORT).into(), &other, rig.now);
    }
    assert_eq!(rig.held(), None);
    rig.machine.handle_datagram((ROUTER, pcp::SERVER_PORT).into(), &answer, rig.now);
    rig.run_for(Duration::from_millis(1));
    assert!(rig.held().is_some(), "the right one");
    request[0] = 0;
    for external in ["0.0.0.0:5", "127.0.0.1:5", "224.0.0.1:5", "255.255.255.255:5", "169.254.1.1:5", "1.2.3.4:0"] {
        assert!(!is_outside(external.parse().unwrap()), "{external}");
    }
}

#[test]
fn a_public_address_asks_nobody_and_a_new_router_is_asked_anew() {
    let mut rig = rig(speaks(true, false, false));
    rig.run_for(MINUTE);
    rig.machine.set_gateway(Some(Gateway { router: ROUTER, own: [8, 8, 8, 8].into() }), rig.now);
    let before = rig.router.requests.len();
    rig.machine.nudge(rig.now);
    rig.machine.survey(rig.now);
    rig.run_for(MINUTE * 60);
    assert_eq!((rig.held(), rig.router.requests.len()), (None, before));
    assert!(rig.machine.status(rig.now).reason.unwrap().contains("public"));
    rig.machine.set_gateway(None, rig.now);
    assert!(rig.machine.status(rig.now).reason.unwrap().contains("no IPv4 router"));
    rig.router.mappings.clear();
    rig.machine.set_gateway(Some(Gateway { router: ROUTER, own: [100, 64, 1, 2].into() }), rig.now);
    rig.run_for(Duration::from_millis(10));
    assert!(rig.held().is_some());
}

#[test]
fn epochs_are_judged_as_the_rfc_says() {
    let seconds = Duration::from_secs;
    assert!(!is_reset(100, 160, seconds(60)));
    assert!(!is_reset(100, 99, seconds(0)), "one second back is rounding");
    assert!(is_reset(100, 98, seconds(0)));
    assert!(!is_reset(0, 1_000, seconds(940)) && !is_reset(0, 940, seconds(1_000)), "clocks differ");
    assert!(is_reset(0, 1_000, seconds(900)) && is_reset(0, 900, seconds(1_000)));
    assert!(!is_reset(u32::MAX, u32::MAX, seconds(0)));
}
