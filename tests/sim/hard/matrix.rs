//! The published matrix: every pair of NAT kinds once, the promised pairs often. The engine's shells can do everything here;
//! `crate::matrix` shows what a plain punch does.

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::time::Duration;

    use meshd::wire::nat::PortModel;

    use crate::hard::cell::{Mapped, run, stage};
    use crate::hard::table::{RUNS, measured};
    use crate::nat::{Kind, NAMES};
    use crate::scenario::Scenario;

    /// What does not come within this time does not come.
    const PATIENCE: Duration = Duration::from_secs(3);

    /// The published table is what the engine does: which pairs are direct, and that every promise holds. Its figures are those
    /// of the run that wrote it, since each change of the engine moves some. `MESHD_UPDATE=1` writes it anew.
    #[test]
    fn the_published_matrix_is_current() {
        if crate::replay().is_some() {
            return;
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/reference/nat-matrix.md");
        let table = published();
        if std::env::var_os("MESHD_UPDATE").is_some() {
            std::fs::write(path, &table).unwrap();
        }
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert_eq!(figures_off(&committed), figures_off(&table), "run with MESHD_UPDATE=1 and read the difference");
    }

    /// Table cells that begin with a digit say the same.
    fn figures_off(text: &str) -> String {
        let cell = |cell: &str| {
            if cell.trim().starts_with(|c: char| c.is_ascii_digit()) { "#".into() } else { cell.to_owned() }
        };
        text.lines().map(|line| line.split('|').map(cell).collect::<Vec<_>>().join("|") + "\n").collect()
    }

    fn published() -> String {
        let mut out = String::from(HEAD);
        let kinds = Kind::all();
        let _ = writeln!(out, "| | {} |", NAMES.join(" | "));
        let _ = writeln!(out, "|---|{}", "---|".repeat(NAMES.len()));
        for (a, name) in kinds.iter().zip(NAMES) {
            let _ = write!(out, "| **{name}** |");
            for b in &kinds {
                let run = run(&Scenario { seed: 1, ..Scenario::pair(*a, *b) }, Mapped::Nobody, PATIENCE);
                let _ = match run.both {
                    Some(time) => write!(out, " {} ms, {} |", time.as_millis(), run.packets_both),
                    None => write!(out, " relay |"),
                };
            }
            out.push('\n');
        }
        let _ = write!(out, "{MIDDLE}{RUNS} runs of each:\n\n{COLUMNS}");
        for (row, cells) in measured() {
            for (pair, cell) in row.pairs.iter().zip(cells) {
                let ms = |percent| cell.percentile(percent).map_or(0, |t| t.as_millis());
                let (a_side, both, mean) = cell.packets();
                let _ = writeln!(
                    out,
                    "| {} | {}{} × {} | {} % | {} | {} | {} | {mean} | {both} | {a_side} |",
                    row.name,
                    pair.0,
                    if row.mapped { ", mapped" } else { "" },
                    pair.1,
                    cell.within(Duration::from_millis(row.within_ms)).floor(),
                    ms(50),
                    ms(95),
                    ms(100),
                );
            }
        }
        out.push_str(TAIL);
        for name in EXAMINED {
            let _ = writeln!(out, "| {name} | {} |", verdict(name));
        }
        out.push_str(&healing());
        out
    }

    /// How traffic gets over troubles.
    fn healing() -> String {
        let mut out = format!("{HEALING}{} runs of each:\n\n{HEALING_COLUMNS}", crate::healing::RUNS);
        for (row, outcome) in crate::healing::measured() {
            let ms = |time: Duration| time.as_millis();
            let _ = writeln!(
                out,
                "| {} | {} × {} | {} | {} | {} | {} | {} | {} | {} |",
                row.name,
                row.pair.0,
                row.pair.1,
                ms(outcome.gap(50)),
                ms(outcome.gap(95)),
                ms(outcome.gap(100)),
                ms(outcome.direct(50)),
                ms(outcome.direct(95)),
                ms(outcome.direct(100)),
                outcome.lost(),
            );
        }
        out
    }

    /// What a node behind this kind of NAT finds out about it.
    fn verdict(name: &str) -> String {
        let (sim, _, a, _) = stage(&Scenario { seed: 1, ..Scenario::pair(name.parse().unwrap(), Kind::Public) });
        let report = sim.node(a).report.clone().expect("it was examined");
        sim.finish();
        let words = [
            report.mapping.as_deref().unwrap_or("unknown"),
            report.filtering.as_deref().unwrap_or("unknown"),
            report.port_model.map_or("not asked", PortModel::name),
            report.hairpin.map_or("not asked", |yes| if yes { "yes" } else { "no" }),
        ];
        words.join(" | ")
    }

    /// The kinds that the kernel can be made to be.
    const EXAMINED: [&str; 16] = [
        "linux",
        "linux+open",
        "linux+random",
        "linux+block512",
        "eim+eif",
        "eim+adf",
        "eim+apdf",
        "eim+eif+hair",
        "eim+apdf+hair",
        "adm+eif",
        "adm+adf",
        "adm+apdf",
        "apdm+eif",
        "apdm+adf",
        "apdm+apdf",
        "apdm+apdf+seq",
    ];

    const HEAD: &str = "\
# Which pairs of NATs get a direct path

Written by the simulator (`tests/sim/hard/matrix.rs`), which runs the real engine and coordinator between two nodes; do
not edit. Words are those of RFC 4787: mapping endpoint-independent (`eim`), address-dependent (`adm`), address- and
port-dependent (`apdm`); filtering likewise (`eif`, `adf`, `apdf`). `seq` counts its ports up, while others make `foreign`
mappings a second; `block` draws from so many ports; the others draw from all. `linux` is masquerade with its default
settings, `linux+open` lets strangers' packets into the router itself, `linux+random` and `linux+block` are `masquerade
fully-random`. `blocked` lets no UDP out, but TCP, as `eim+apdf`; all treat TCP as UDP, from a table of their own. The direct
path of a pair with `blocked` is a TCP connection. `mapped`: the router granted the node a port by
PCP.

Two nodes on the internet, each behind its own NAT, 20 ms apart, 30 ms through the relay; the coordinator's STUN server has
two addresses, and the nodes may open 512 sockets. The figures are those of one run. Rows speak first. Milliseconds from the first packet until both sides
send directly, and the probes and STUN requests of both until then:

";

    const MIDDLE: &str = "
The same pairs on one LAN are always direct. Behind one carrier's NAT they are as in the table if the carrier's NAT is
endpoint-independent and hairpins (RFC 6888), and relayed otherwise, unless one of them has no NAT of its own there or
was granted a port mapping by its own.

";

    const COLUMNS: &str = "\
| | pair | in time | median ms | 95 % | worst | packets, mean | most | of one side |
|---|---|---|---|---|---|---|---|---|
";

    const HEALING: &str = "
## When the network changes under a direct path

A ping every 10 ms, while between the two sites nothing passes for eight seconds, one machine moves to another network, or the first
one's NAT forgets its mappings or gets another address. The relay is a TCP connection here, which a machine that moved must make
anew. Milliseconds without an answered ping, by when they were sent, and until both send directly again, counted from the change or
from when the blackhole ended; pings lost on average. ";

    const HEALING_COLUMNS: &str = "\
| | pair | silent, median ms | 95 % | worst | direct again, median ms | 95 % | worst | lost |
|---|---|---|---|---|---|---|---|---|
";

    const TAIL: &str = "
Two NATs that draw from all ports and filter by port are relayed; such a pair sends at most 50 packets a minute a side.

## What `meshd netcheck` says behind each

The simulator's kinds as netcheck sees them. `cargo test --test lab -- netcheck::the_kernels_nats_are_the_simulators` makes each of them of the
kernel's NAT (`tests/lab/nats.rs`), runs the real netcheck behind it, and finds the same:

| kind | mapping | filtering | ports | hairpin |
|---|---|---|---|---|
";
}
