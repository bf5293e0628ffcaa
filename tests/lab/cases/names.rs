//! Names of nodes, as the machine's own C library resolves them.
//!
//! Each machine here has an `/etc/resolv.conf` of its own: a file mounted there, as `ip netns exec` and containers do it.

use std::fs::{self, Permissions};
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hickory_proto::op::{Message, OpCode, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record, RecordType};
use meshd::cli::demo::net::Namespace;

use crate::net;
use crate::runner::{Case, case};
use crate::world::{Node, ensure, error_of, eventually, until};

/// What the other name server says of the names it knows.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 80);
/// How long a lookup may take that does not have to wait for a server that is gone.
const PROMPT: Duration = Duration::from_secs(2);

pub fn cases() -> Vec<Case> {
    vec![
        case("names::nodes_resolve_both_ways_and_other_names_as_before", resolve),
        case("names::killed_the_machine_still_resolves_and_down_restores_the_file", killed),
        case("names::accept_dns_false_leaves_the_file_alone", refused),
        case("names::what_an_admin_typed_resolves_on_every_node_and_nothing_else_does", typed),
        case("names::two_thousand_names", many),
    ]
}

/// A machine's own `/etc/resolv.conf`.
struct Etc {
    file: PathBuf,
    original: String,
}

impl Etc {
    /// With the other name server, and a search domain.
    fn new(name: &str, server: &str) -> Result<Self> {
        let file = PathBuf::from(format!("/run/lab/{name}.resolv.conf"));
        let original = format!("# of {name}\nsearch lan\nnameserver {server}\noptions timeout:5\n");
        fs::write(&file, &original)?;
        Ok(Self { file, original })
    }

    fn now(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.file)?)
    }

    /// A node on which programs see this file.
    fn node(&self, name: &str, namespace: Namespace) -> Result<Node> {
        let mut node = Node::new(name, namespace);
        let script = format!("/run/lab/meshd-{name}");
        let program =
            format!("mount --bind {} /etc/resolv.conf && exec {} \"$@\"", self.file.display(), node.binary.display());
        fs::write(&script, format!("#!/bin/sh\nexec unshare --mount sh -c '{program}' meshd \"$@\"\n"))?;
        fs::set_permissions(&script, Permissions::from_mode(0o755))?;
        node.binary = script.into();
        Ok(node)
    }

    /// What the C library says.
    fn getent(&self, node: &Node, database: &str, name: &str) -> Result<String> {
        let program = format!("mount --bind {} /etc/resolv.conf && exec getent {database} {name}", self.file.display());
        node.namespace.run(Command::new("unshare").args(["--mount", "sh", "-c", &program]))
    }
}

/// Says `says` of the IPv4 address of whatever ends in `.org`, and that there is nothing else.
fn other_server(namespace: &Namespace, at: &str, says: Ipv4Addr) -> Result<()> {
    let socket = namespace.enter(|| UdpSocket::bind((at, 53)))??;
    // It ends with the case's process.
    std::thread::spawn(move || {
        let mut buffer = [0; 1_500];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let Ok(question) = Message::from_vec(&buffer[..length]) else { continue };
            let mut answer = Message::response(question.metadata.id, OpCode::Query);
            answer.add_queries(question.queries.iter().cloned());
            for asked in &question.queries {
                match asked.query_type {
                    _ if !asked.name.to_ascii().ends_with(".org.") => {
                        answer.metadata.response_code = ResponseCode::NXDomain;
                    }
                    RecordType::A => {
                        answer.add_answer(Record::from_rdata(asked.name.clone(), 60, RData::A(A(says))));
                    }
                    _ => {}
                }
            }
            if let Ok(bytes) = answer.to_vec() {
                let _ = socket.send_to(&bytes, from);
            }
        }
    });
    Ok(())
}

/// Two nodes with public addresses, the first with its own `/etc/resolv.conf`.
fn two() -> Result<(net::Topology, Node, Node, Etc)> {
    let lab = net::public()?;
    let (_, third) = lab.machines.iter().find(|(name, _)| *name == "c").context("no machine c")?;
    other_server(third, "0.0.0.0", ELSEWHERE)?;
    let at = third.ip("-o -4 addr show dev eth0")?;
    let server = at.split_whitespace().nth(3).and_then(|net| net.split('/').next()).context("c has no address")?;
    let etc = Etc::new("a", server)?;
    let machine = |name| {
        let found = lab.machines.iter().find(|(is, _)| *is == name).context("no such machine");
        found.map(|(_, namespace)| namespace.clone())
    };
    let (a, b) = (etc.node("a", machine("a")?)?, Node::new("b", machine("b")?));
    Ok((lab, a, b, etc))
}

fn resolve() -> Result<()> {
    let (lab, a, b, etc) = two()?;
    a.up(&lab.world.coordinator.claim()?)?;
    eventually("the system asks meshd", Duration::from_secs(5), || {
        ensure(etc.now()?.contains("nameserver 127."), || {
            format!("resolv.conf is still\n{}", etc.now().unwrap_or_default())
        })
    })?;
    b.up(&a.invite()?)?;
    let (v4, v6) = (b.address(true)?.to_string(), b.address(false)?.to_string());
    for name in ["b", "b.home.internal", "B.HOME.internal"] {
        let found = eventually("b resolves", Duration::from_secs(8), || etc.getent(&a, "ahostsv4", name))?;
        ensure(found.starts_with(&v4), || format!("{name} is {found}, not {v4}"))?;
    }
    let found = etc.getent(&a, "ahostsv6", "b.home.internal")?;
    ensure(found.starts_with(&v6), || format!("b is {found}, not {v6}"))?;
    for address in [&v4, &v6] {
        let found = etc.getent(&a, "hosts", address)?;
        ensure(found.contains("b.home.internal"), || format!("{address} is {found}"))?;
    }
    let found = etc.getent(&a, "ahostsv4", "www.example.org")?;
    ensure(found.starts_with(&ELSEWHERE.to_string()), || format!("www.example.org is {found}"))?;
    ensure(etc.getent(&a, "ahostsv4", "nobody.home.internal").is_err(), || "nobody resolves".to_owned())?;
    let listed = a.run(&["footprint"])?;
    ensure(listed.contains("/etc/resolv.conf"), || format!("the footprint does not name the file:\n{listed}"))?;

    // Switched off and on again while it runs.
    a.run(&["set", "--accept-dns=false"])?;
    eventually("the file is as before", Duration::from_secs(5), || same(&etc))?;
    a.run(&["set", "--accept-dns"])?;
    eventually("names resolve again", Duration::from_secs(5), || etc.getent(&a, "ahostsv4", "b"))?;
    // A DHCP client comes by: its servers are those of before from now on.
    fs::write(&etc.file, etc.original.replace("# of a", "# of the DHCP client"))?;
    a.run(&["set", "--snat=false"])?;
    eventually("names resolve after that", Duration::from_secs(5), || etc.getent(&a, "ahostsv4", "b"))?;
    a.run(&["down"])?;
    ensure(etc.now()?.starts_with("# of the DHCP client"), || format!("down left\n{}", etc.now().unwrap_or_default()))
}

fn killed() -> Result<()> {
    let (lab, a, _, etc) = two()?;
    a.up(&lab.world.coordinator.claim()?)?;
    eventually("the system asks meshd", Duration::from_secs(5), || etc.getent(&a, "ahostsv4", "a.home.internal"))?;
    let pid = a.pid()?;
    let killed = Command::new("kill").args(["-KILL", &pid.to_string()]).status()?;
    ensure(killed.success(), || "the daemon cannot be killed".to_owned())?;
    until("the daemon is gone", Duration::from_secs(5), || {
        Ok((!Path::new(&format!("/proc/{pid}")).exists()).then_some(()))
    })?;
    let start = Instant::now();
    let found = etc.getent(&a, "ahostsv4", "www.example.org")?;
    let took = start.elapsed();
    ensure(found.starts_with(&ELSEWHERE.to_string()), || format!("www.example.org is {found}"))?;
    ensure(took < PROMPT, || format!("without the daemon a lookup takes {took:?}"))?;
    println!("    a lookup after kill -9 took {took:?}");
    a.run(&["down"])?;
    same(&etc)
}

fn refused() -> Result<()> {
    let (lab, a, _, etc) = two()?;
    a.namespace.run(
        a.meshd(&["up", "--name", "a", "--accept-dns=false"]).env("MESHD_TOKEN", lab.world.coordinator.claim()?),
    )?;
    // It answers those who ask it all the same.
    let mesh = a.address(true)?;
    let answered = a.namespace.enter(|| -> Result<bool> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut question = Message::query();
        question.add_query(hickory_proto::op::Query::query("a.home.internal.".parse()?, RecordType::A));
        socket.send_to(&question.to_vec()?, (mesh, 53))?;
        let mut buffer = [0; 1_500];
        let (length, _) = socket.recv_from(&mut buffer)?;
        Ok(Message::from_vec(&buffer[..length])?.answers.len() == 1)
    })??;
    ensure(answered, || "no answer on the mesh address".to_owned())?;
    same(&etc)
}

/// Behind b there is 10.53.0.0/24, with a name server that knows what ends in .org.
fn typed() -> Result<()> {
    let (lab, a, b, etc) = two()?;
    a.up(&lab.world.coordinator.claim()?)?;
    b.namespace.ip("link set lo up")?;
    b.namespace.ip("address add 10.53.0.53/24 dev lo")?;
    let token = a.run(&["invite", "--routes", "10.53.0.0/24"])?;
    let up = ["up", "--name", "b", "--advertise-routes", "10.53.0.0/24"];
    b.namespace.run(b.meshd(&up).env("MESHD_TOKEN", token.trim()))?;
    let inside = Ipv4Addr::new(10, 53, 0, 80);
    other_server(&b.namespace, "10.53.0.53", inside)?;

    a.run(&["dns", "add", "nas.home", "10.53.0.10", "2001:db8:53::10"])?;
    a.run(&["dns", "add", "cam", "10.53.0.30"])?;
    let is = |name: &str, database: &str, address: &str| {
        eventually(name, Duration::from_secs(8), || {
            let found = etc.getent(&a, database, name)?;
            ensure(found.starts_with(address), || format!("{name} is {found}, not {address}"))
        })
    };
    for (name, database, address) in [
        ("nas.home", "ahostsv4", "10.53.0.10"),
        ("NAS.home.", "ahostsv6", "2001:db8:53::10"),
        ("cam", "ahostsv4", "10.53.0.30"),
        ("cam.home.internal", "ahostsv4", "10.53.0.30"),
        // Everything else in the world is as before.
        ("www.example.org", "ahostsv4", &ELSEWHERE.to_string()),
    ] {
        is(name, database, address)?;
    }
    let back = [("10.53.0.10", "nas.home"), ("2001:db8:53::10", "nas.home"), ("10.53.0.30", "cam.home.internal")];
    for (address, name) in back {
        let found = etc.getent(&a, "hosts", address)?;
        ensure(found.contains(name), || format!("{address} is {found}"))?;
    }
    for nobody in ["tv.home", "www.nas.home", "home"] {
        ensure(etc.getent(&a, "ahostsv4", nobody).is_err(), || format!("{nobody} resolves"))?;
    }
    // A user of any node sees what an admin typed.
    eventually("b lists it", Duration::from_secs(5), || {
        let listed = b.run(&["dns", "list"])?;
        ensure(listed.contains("nas.home") && listed.contains("10.53.0.10"), || listed)
    })?;

    // A domain with a server of its own, asked through the mesh.
    a.run(&["dns", "split", "corp.org", "10.53.0.53"])?;
    is("git.corp.org", "ahostsv4", &inside.to_string())?;
    is("www.example.org", "ahostsv4", &ELSEWHERE.to_string())?;
    // With a server that does not answer meshd asks nobody else, though the outside knows such names too.
    a.run(&["dns", "split", "corp.org", "10.53.0.54"])?;
    let mesh = a.address(true)?;
    eventually("nobody answers", Duration::from_secs(20), || {
        let (found, _) = ask(&a, mesh, "git.corp.org.")?;
        ensure(found.is_none(), || format!("it is {found:?}"))
    })?;
    a.run(&["dns", "split", "corp.org", "none"])?;
    is("git.corp.org", "ahostsv4", &ELSEWHERE.to_string())?;

    a.run(&["dns", "remove", "nas.home"])?;
    eventually("the name is gone", Duration::from_secs(5), || {
        ensure(etc.getent(&a, "ahostsv4", "nas.home").is_err(), || "it still resolves".to_owned())
    })?;
    for (args, wanted) in [
        (&["dns", "add", "b", "10.53.0.10"][..], "name-taken"),
        (&["dns", "add", "nas.local", "10.53.0.10"], "bad-name"),
        (&["dns", "add", "nas.home", "10.54.0.10"], "address-not-routed"),
        (&["dns", "remove", "nas.home"], "no-such-name"),
    ] {
        let error = error_of(&a.output(&[args, &["--json"]].concat())?)?;
        ensure(error["code"] == wanted && error["hint"] != "", || format!("{args:?}: {error}"))?;
    }
    let error = error_of(&b.output(&["dns", "add", "nas.home", "10.53.0.10", "--json"])?)?;
    ensure(error["code"] == "not-an-admin", || error.to_string())?;
    a.run(&["down"])?;
    same(&etc)
}

/// Asks a node for a name's address, and says how long that took.
fn ask(node: &Node, server: IpAddr, name: &str) -> Result<(Option<Ipv4Addr>, Duration)> {
    node.namespace.enter(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut question = Message::query();
        question.add_query(hickory_proto::op::Query::query(name.parse()?, RecordType::A));
        let begin = Instant::now();
        socket.send_to(&question.to_vec()?, (server, 53))?;
        let mut buffer = [0; 1_500];
        let (length, _) = socket.recv_from(&mut buffer)?;
        let took = begin.elapsed();
        let answer = Message::from_vec(&buffer[..length])?;
        let found = answer.answers.first().and_then(|a| if let RData::A(A(v4)) = a.data { Some(v4) } else { None });
        Ok((found, took))
    })?
}

fn many() -> Result<()> {
    const NAMES: u16 = 2_000;
    let (lab, a, b, _etc) = two()?;
    a.up(&lab.world.coordinator.claim()?)?;
    b.up(&a.invite()?)?;
    let mesh = b.address(true)?;
    let host = |n: u16| Ipv4Addr::from(0xCB00_7100_u32 + u32::from(n));
    let lines: String = (0..NAMES).map(|n| format!("{} host-{n}.branch.example\n", host(n))).collect();
    fs::write("/run/lab/hosts", lines)?;
    let lookup = |n: u16| -> Result<Duration> {
        let mut times = Vec::new();
        for _ in 0..25 {
            let (found, took) = ask(&b, mesh, &format!("host-{n}.branch.example."))?;
            ensure(found == Some(host(n)), || format!("host-{n} is {found:?}"))?;
            times.push(took);
        }
        times.into_iter().min().context("no lookup")
    };
    a.run(&["dns", "add", "host-0.branch.example", &host(0).to_string()])?;
    eventually("one name is there", Duration::from_secs(5), || lookup(0))?;
    let alone = lookup(0)?;
    let begin = Instant::now();
    a.run(&["dns", "add", "--file", "/run/lab/hosts"])?;
    let stored = begin.elapsed();
    until("the last name is there", Duration::from_secs(30), || {
        Ok(ask(&b, mesh, &format!("host-{}.branch.example.", NAMES - 1))?.0)
    })?;
    let accepted = begin.elapsed();
    let among = lookup(NAMES / 2)?;
    println!(
        "    {NAMES} names: signed and stored in {stored:?}, accepted by the other node after {accepted:?}; a lookup took \
         {alone:?} with one name and {among:?} with all (best of 25)"
    );
    let listed = b.run(&["dns", "list", "--json"])?;
    let count = listed.matches("branch.example").count();
    ensure(count == usize::from(NAMES), || format!("{count} names are listed"))
}

fn same(etc: &Etc) -> Result<()> {
    ensure(etc.now()? == etc.original, || format!("resolv.conf is\n{}", etc.now().unwrap_or_default()))
}
