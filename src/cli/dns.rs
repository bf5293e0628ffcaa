//! `meshd dns`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::cli::error::{CliError, Kind};
use crate::cli::output::{BOLD, YELLOW, paint, table};
use crate::cli::{Global, client};
use crate::wire::local::{Call, DnsChange, DnsChanges, DnsKind, DnsLine, DnsList, DnsWord, MAX_DNS_WORDS, Response};
use crate::wire::version;

/// Options of `meshd dns`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "\
Nodes have names by themselves: NAME.NETWORK.internal. Besides, an admin can give any other name
addresses, for all nodes. Each is that name and nothing else: `nas.home` says nothing about
`tv.home`. A name without a dot is put into the network, like a node's. Addresses look up as
names too. Questions about a whole domain can be sent to servers of its own, through the mesh.

Examples:
  meshd dns list
  meshd dns add nas.home 192.168.1.10
  meshd dns add printer 192.168.1.30 2001:db8:1::30
  meshd dns add --file hosts.txt
  meshd dns remove nas.home
  meshd dns split corp.example 10.0.0.53",
    args_conflicts_with_subcommands = true
)]
pub struct Args {
    #[command(subcommand)]
    word: Option<Word>,
}

#[derive(Debug, clap::Subcommand)]
enum Word {
    /// Show the names that admins gave addresses, and what they are on this node
    List,
    /// Give a name addresses, instead of those it had (admin nodes only)
    Add(Add),
    /// Take the addresses of names away (admin nodes only)
    Remove(Remove),
    /// Send questions about a domain and all names in it to DNS servers of its own (admin nodes only)
    Split(Split),
}

#[derive(Debug, clap::Args)]
struct Add {
    /// The name, such as nas.home
    #[arg(value_name = "NAME", required_unless_present = "file")]
    name: Option<String>,
    /// Its addresses, IPv4 or IPv6
    #[arg(value_name = "ADDRESS", required_unless_present = "file")]
    addresses: Vec<IpAddr>,
    /// Names and addresses from a file as /etc/hosts is one
    #[arg(long, value_name = "FILE", conflicts_with_all = ["name", "addresses"])]
    file: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Args)]
struct Place {
    /// The node behind which the addresses are, where several lead to the same numbers
    #[arg(long, value_name = "NODE")]
    at: Option<String>,
    /// Also addresses that no node may lead to
    #[arg(long)]
    anyway: bool,
}

#[derive(Debug, clap::Args)]
struct Remove {
    /// Names
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

#[derive(Debug, clap::Args)]
struct Split {
    /// The domain, such as corp.example
    #[arg(value_name = "DOMAIN")]
    domain: String,
    /// Its DNS servers, asked in this order, or `none`
    #[arg(value_name = "SERVER", required = true)]
    servers: Vec<String>,
    #[command(flatten)]
    place: Place,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<(), CliError> {
    match &args.word {
        None | Some(Word::List) => list(global),
        Some(Word::Add(add)) => {
            let words = match (&add.file, &add.name) {
                (Some(file), _) => read(file)?,
                (None, name) => vec![named(name.clone().unwrap_or_default(), add.addresses.clone())],
            };
            say(global, words, &add.place)
        }
        Some(Word::Remove(remove)) => {
            let words = remove.names.iter().map(|name| named(name.clone(), Vec::new())).collect();
            say(global, words, &Place { at: None, anyway: true })
        }
        Some(Word::Split(split)) => {
            let none = split.servers.as_slice() == ["none"];
            let servers = if none { &[][..] } else { &split.servers };
            let address = |server: &String| {
                let text = format!("{server:?} is not the address of a server");
                let hint = "give addresses, such as 10.0.0.53, or `none` alone";
                server.parse().map_err(|_| CliError::new(Kind::Usage, "usage", text, hint))
            };
            let addresses = servers.iter().map(address).collect::<Result<_, _>>()?;
            say(global, vec![DnsWord { kind: DnsKind::Split, name: split.domain.clone(), addresses }], &split.place)
        }
    }
}

const fn named(name: String, addresses: Vec<IpAddr>) -> DnsWord {
    DnsWord { kind: DnsKind::Name, name, addresses }
}

/// Has words published, as many at once as go.
fn say(global: &Global, words: Vec<DnsWord>, place: &Place) -> Result<(), CliError> {
    let output = global.output();
    let many = words.len() > MAX_DNS_WORDS;
    let mut all = DnsChanges { schema: version::LOCAL, changes: Vec::new() };
    for chunk in words.chunks(MAX_DNS_WORDS) {
        let call = Call::DnsWords { words: chunk.to_vec(), at: place.at.clone(), anyway: place.anyway };
        let asked = client::ask(global, call, |reply| if let Response::DnsChanged(c) = reply { Some(c) } else { None });
        all.changes.extend(
            asked
                .inspect_err(|_| {
                    if !all.changes.is_empty() {
                        output.note(&format!("the first {} are done", all.changes.len()));
                    }
                })?
                .changes,
        );
    }
    let notes = all.changes.iter().filter(|change| !change.already).filter_map(|change| change.note.as_ref());
    for note in notes.take(if many { 5 } else { usize::MAX }) {
        output.note(&format!("{} {note}", paint("note:", BOLD)));
    }
    output.show(&all, |all| {
        if many {
            let already = all.changes.iter().filter(|change| change.already).count();
            return format!("{} names have their addresses, {already} of them as before", all.changes.len());
        }
        all.changes.iter().map(said).collect::<Vec<_>>().join("\n")
    })
}

fn said(change: &DnsChange) -> String {
    let DnsChange { kind, name, addresses, at, already, .. } = change;
    let (has, is, whole) = match kind {
        DnsKind::Name => ("addresses", "is", ""),
        DnsKind::Split => ("servers of its own", "is asked of", "*."),
    };
    if addresses.is_empty() {
        return format!("{whole}{name} has no {has} any more");
    }
    let at = at.as_ref().map_or_else(String::new, |at| format!(" behind {at}"));
    format!("{whole}{name} {is} {}{at}{}", shown(addresses), if *already { " already" } else { "" })
}

fn shown(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Reads a file as hosts(5): an address, then its names; what follows a `#` is for people.
fn read(file: &Path) -> Result<Vec<DnsWord>, CliError> {
    let shown = file.display();
    let failed = |what: String| {
        CliError::new(Kind::Usage, "bad-file", what, "a line is an address and its names, as in /etc/hosts")
    };
    let text = std::fs::read_to_string(file).map_err(|e| failed(format!("{shown} cannot be read: {e}")))?;
    let mut names: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let mut parts = line.split('#').next().unwrap_or_default().split_whitespace();
        let Some(address) = parts.next() else { continue };
        let at = || format!("line {} of {shown}", number + 1);
        let address: IpAddr = address.parse().map_err(|_| failed(format!("{address:?} in {} is no address", at())))?;
        let mut any = false;
        for name in parts {
            any = true;
            let addresses = names.entry(name.to_lowercase()).or_default();
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if !any {
            return Err(failed(format!("{} gives {address} no name", at())));
        }
    }
    if names.is_empty() {
        return Err(failed(format!("{shown} names nothing")));
    }
    Ok(names.into_iter().map(|(name, addresses)| named(name, addresses)).collect())
}

fn list(global: &Global) -> Result<(), CliError> {
    let list = client::ask(global, Call::Dns, |reply| if let Response::Dns(l) = reply { Some(l) } else { None })?;
    global.output().show(&list, text)
}

/// The names as a person reads them: a line each, then what is to be said about some.
fn text(list: &DnsList) -> String {
    let lines: Vec<&DnsLine> = list.names.iter().chain(&list.splits).collect();
    if lines.is_empty() {
        return "no names but those of nodes; an admin adds one: meshd dns add nas.home 192.168.1.10".to_owned();
    }
    let mut rows = vec![["NAME", "ADDRESSES", "AT", "HERE"].map(str::to_owned).to_vec()];
    let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    rows.extend(lines.iter().map(|line| {
        let name = match line.kind {
            DnsKind::Name => line.name.clone(),
            DnsKind::Split => format!("*.{}", line.name),
        };
        let prefix = if line.kind == DnsKind::Split { "ask " } else { "" };
        let at = line.at.clone().unwrap_or_default();
        vec![name, format!("{prefix}{}", shown(&line.addresses)), or_dash(at), or_dash(shown(&line.here))]
    }));
    let mut text = table(&rows);
    for line in lines {
        if let Some(why) = &line.why {
            text.push_str(&format!("{}: {why}\n", paint(&line.name, YELLOW)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hosts_file_is_read_as_hosts_files_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hosts");
        std::fs::write(&path, "# mine\n192.168.1.10 nas.home NAS.home files.home # both\n\nfd00::10\tnas.home\n")
            .unwrap();
        let words = read(&path).unwrap();
        let shown: Vec<String> = words.iter().map(|w| format!("{} {}", w.name, shown(&w.addresses))).collect();
        assert_eq!(shown, ["files.home 192.168.1.10", "nas.home 192.168.1.10, fd00::10"]);
        for (bad, said) in [("nas.home 1.2.3.4", "no address"), ("10.0.0.1", "no name"), ("# nothing", "names nothing")]
        {
            std::fs::write(&path, bad).unwrap();
            let why = read(&path).unwrap_err();
            assert!(why.problem.text.contains(said), "{}", why.problem.text);
        }
        assert!(read(&dir.path().join("absent")).is_err());
    }
}
