//! `/etc/resolv.conf` (resolv.conf(5)): reading what it says, and putting our server before the others.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The file.
pub(in crate::daemon) const PATH: &str = "/etc/resolv.conf";
/// How a file of ours begins.
const MARK: &str = "# meshd wrote this file; `meshd down` puts back the one before.";
/// A longer file is no such file.
const LIMIT: u64 = 64 << 10;

/// What was there before ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Before {
    /// Nothing.
    Absent,
    /// A file with this text.
    File(String),
    /// A symbolic link to here.
    Link(PathBuf),
}

/// What is at `path`, without following a link.
///
/// # Errors
/// It cannot be read, or is no text.
pub(super) fn look(path: &Path) -> io::Result<Before> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Before::Absent),
        Err(e) => Err(e),
        Ok(meta) if meta.is_symlink() => fs::read_link(path).map(Before::Link),
        Ok(_) => read(path).map(Before::File),
    }
}

/// The text a program that reads `path` gets; empty if there is nothing.
pub(super) fn text(path: &Path) -> String {
    read(path).unwrap_or_default()
}

fn read(path: &Path) -> io::Result<String> {
    if fs::metadata(path)?.len() > LIMIT {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too long"));
    }
    fs::read_to_string(path)
}

/// We wrote this text.
pub(super) fn is_ours(text: &str) -> bool {
    text.starts_with(MARK)
}

/// The servers a text names, but for `ours`.
pub(super) fn servers(text: &str, ours: Option<Ipv4Addr>) -> Vec<IpAddr> {
    let named = lines(text, "nameserver").filter_map(|rest| rest.split('%').next()?.trim().parse::<IpAddr>().ok());
    named.filter(|server| ours.is_none_or(|ours| *server != IpAddr::V4(ours))).collect()
}

/// The text with our server first and our domain last among those searched, so that short names mean what they meant before.
pub(super) fn with_ours(before: &str, server: Ipv4Addr, domain: &str) -> String {
    let mut text = format!("{MARK}\nnameserver {server}\n");
    let searched = lines(before, "search").chain(lines(before, "domain")).last().unwrap_or_default();
    let others: Vec<&str> = searched.split_whitespace().filter(|other| *other != domain).collect();
    text.push_str("search ");
    for other in others {
        text.push_str(other);
        text.push(' ');
    }
    text.push_str(domain);
    text.push('\n');
    for line in before.lines() {
        let word = line.split_whitespace().next().unwrap_or_default();
        if !matches!(word, "search" | "domain") {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

fn lines<'a>(text: &'a str, keyword: &'a str) -> impl Iterator<Item = &'a str> {
    text.lines().filter_map(move |line| {
        let rest = line.strip_prefix(keyword)?;
        rest.starts_with([' ', '\t']).then(|| rest.trim())
    })
}

/// Puts `text` at `path`: as a new file in place of what is there or, where that file is a mount of its own, into it.
///
/// # Errors
/// The file system refuses.
pub(super) fn put(path: &Path, text: &str) -> io::Result<()> {
    let replaced = replace(path, |new| {
        let mut file = OpenOptions::new().write(true).create_new(true).open(new)?;
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    match replaced {
        Err(_) if fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file()) => {
            let mut file = OpenOptions::new().write(true).truncate(true).open(path)?;
            file.write_all(text.as_bytes())
        }
        replaced => replaced,
    }
}

/// Puts back what was there before ours. What is there now and is not ours stays.
///
/// # Errors
/// The file system refuses.
pub(in crate::daemon) fn put_back(path: &Path, before: &Before) -> io::Result<()> {
    match look(path)? {
        Before::File(now) if is_ours(&now) => {}
        _ => return Ok(()),
    }
    match before {
        Before::Absent => match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        },
        Before::File(text) => put(path, text),
        Before::Link(target) => replace(path, |new| symlink(target, new)),
    }
}

/// Makes something beside `path`, and moves it there in one step.
fn replace(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let new = path.with_extension("conf.meshd-new");
    // One left by a daemon that was killed right here.
    let _ = fs::remove_file(&new);
    let moved = make(&new).and_then(|()| fs::rename(&new, path));
    if moved.is_err() {
        let _ = fs::remove_file(&new);
    }
    moved
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGINAL: &str =
        "# from the router\nnameserver 192.168.1.1\nnameserver fe80::1%eth0\nsearch lan\noptions edns0\n";

    #[test]
    fn our_server_is_first_and_our_domain_last() {
        let ours = with_ours(ORIGINAL, Ipv4Addr::new(127, 71, 0, 1), "home.internal");
        assert!(is_ours(&ours) && !is_ours(ORIGINAL));
        let rest: Vec<&str> = ours.lines().skip(1).collect();
        assert_eq!(
            rest,
            [
                "nameserver 127.71.0.1",
                "search lan home.internal",
                "# from the router",
                "nameserver 192.168.1.1",
                "nameserver fe80::1%eth0",
                "options edns0"
            ]
        );
        let others: Vec<String> =
            servers(&ours, Some(Ipv4Addr::new(127, 71, 0, 1))).iter().map(ToString::to_string).collect();
        assert_eq!(others, ["192.168.1.1", "fe80::1"]);
        assert!(with_ours("", Ipv4Addr::LOCALHOST, "home.internal").ends_with("search home.internal\n"));
        assert!(with_ours("domain corp\n", Ipv4Addr::LOCALHOST, "x").contains("search corp x\n"));
    }

    #[test]
    fn whatever_was_there_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let target = dir.path().join("stub");
        fs::write(&target, ORIGINAL).unwrap();
        let cases: [(&str, &dyn Fn()); 3] = [
            ("absent", &|| {}),
            ("file", &|| fs::write(&path, ORIGINAL).unwrap()),
            ("link", &|| symlink(&target, &path).unwrap()),
        ];
        for (what, make) in cases {
            let _ = fs::remove_file(&path);
            make();
            let before = look(&path).unwrap();
            put(&path, &with_ours(&text(&path), Ipv4Addr::LOCALHOST, "home.internal")).unwrap();
            assert!(is_ours(&text(&path)), "{what}");
            assert_eq!(text(&target), ORIGINAL, "a link's target is left alone");
            put_back(&path, &before).unwrap();
            assert_eq!(look(&path).unwrap(), before, "{what}");
            // Again is harmless.
            put_back(&path, &before).unwrap();
            assert_eq!(look(&path).unwrap(), before, "{what}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
    }

    #[test]
    fn what_somebody_else_wrote_since_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        fs::write(&path, "nameserver 10.0.0.1\n").unwrap();
        put_back(&path, &Before::File(ORIGINAL.to_owned())).unwrap();
        assert_eq!(text(&path), "nameserver 10.0.0.1\n");
    }
}
