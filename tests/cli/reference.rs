//! The pages under `docs/reference/` that are written by the program: they cannot fall behind.

use std::fs;
use std::path::Path;

use meshd::engine::drops::Drop;

use crate::help::{commands, help_of};

fn assert_page(name: &str, page: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference").join(name);
    if std::env::var_os("MESHD_UPDATE").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, page).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(found == page, "docs/reference/{name} is out of date: MESHD_UPDATE=1 cargo test --test cli");
}

const WRITTEN_BY: &str = "Written by `MESHD_UPDATE=1 cargo test --test cli`.";

#[test]
fn commands_page() {
    let mut page = format!("# Commands\n\nWhat `meshd COMMAND --help` prints. {WRITTEN_BY}\n");
    for words in commands() {
        let name = if words.is_empty() { "meshd".to_owned() } else { format!("meshd {}", words.join(" ")) };
        let help: String = help_of(&words).lines().map(|line| format!("{}\n", line.trim_end())).collect();
        page.push_str(&format!("\n## {name}\n\n```text\n{help}```\n"));
    }
    assert_page("cli.md", &page);
}

#[test]
fn drop_reasons_page() {
    let mut page = format!(
        "# Drop reasons\n\nEvery packet or message that a node drops is counted under one of these names; `meshd status --drops` shows\n\
         those that happened. {WRITTEN_BY}\n\n| reason | meaning |\n|---|---|\n"
    );
    for reason in Drop::ALL {
        page.push_str(&format!("| `{}` | {} |\n", reason.name(), reason.text()));
    }
    assert_page("drop-reasons.md", &page);
}
