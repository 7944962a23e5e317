//! What the docs promise about themselves: every reason of a finding has its section, and every link leads somewhere.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const PAGE: &str = "docs/troubleshooting.md";
/// Where findings are made.
const SOURCES: [&str; 2] = ["agent/core/src", "agent/src"];
/// What a reason is passed to, as its first argument, or as a field.
const MAKERS: [&str; 8] = [
    "findings.error(",
    "findings.warning(",
    "finding(",
    "warning(",
    "Problem::error(",
    "Problem::warning(",
    "Finding::new(",
    "reason:",
];

fn files(under: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(under).unwrap_or_else(|e| panic!("{}: {e}", under.display())) {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files(&path, ending, found);
        } else if path.extension().is_some_and(|e| e == ending) {
            found.push(path);
        }
    }
}

/// Programs without tests and comments.
fn sources(under: &str) -> Vec<(PathBuf, String)> {
    let mut paths = Vec::new();
    files(&Path::new(ROOT).join(under), "rs", &mut paths);
    let is_test = |p: &PathBuf| {
        let below = p.strip_prefix(ROOT).expect("below the root");
        below.components().any(|c| c.as_os_str() == "tests") || below.ends_with("tests.rs")
    };
    paths.retain(|p| !is_test(p));
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("a source");
        let code = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        let code: Vec<&str> = code.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
        (path, code.join("\n"))
    };
    paths.into_iter().map(read).collect()
}

/// The string literal that `text` begins with, and what follows it.
fn literal(text: &str) -> Option<(&str, &str)> {
    text.trim_start().strip_prefix('"')?.split_once('"')
}

fn is_reason(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_uppercase()) && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// Literals that are passed as reasons of findings. A condition's reason is a String: `.to_owned()` follows it.
fn reasons(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for maker in MAKERS {
        for (at, _) in code.match_indices(maker) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
                continue;
            }
            if let Some((reason, after)) = literal(&code[at + maker.len()..])
                && is_reason(reason)
                && !after.starts_with('.')
            {
                found.insert(reason.to_owned());
            }
        }
    }
    found
}

/// Headings of the third level below one of the second.
fn sections(page: &str, chapter: &str) -> BTreeSet<String> {
    let mut inside = false;
    let mut found = BTreeSet::new();
    for line in page.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            inside = title == chapter;
        } else if let Some(title) = line.strip_prefix("### ").filter(|_| inside) {
            assert!(found.insert(title.to_owned()), "{PAGE} has two sections {title}");
        }
    }
    found
}

fn page() -> String {
    fs::read_to_string(Path::new(ROOT).join(PAGE)).expect("the page")
}

#[test]
fn every_reason_has_a_section_and_every_section_a_reason() {
    let code: Vec<(PathBuf, String)> = SOURCES.into_iter().flat_map(sources).collect();
    let found: BTreeSet<String> = code.iter().flat_map(|(_, code)| reasons(code)).collect();
    // Far more than this: the search itself works.
    assert!(found.len() > 40 && found.contains("RangeOverlap") && found.contains("MtuTooSmall"), "{found:?}");
    let sections = sections(&page(), "Findings");
    let missing: Vec<_> = found.difference(&sections).collect();
    assert!(
        missing.is_empty(),
        "{PAGE} has no section for {missing:?}: say what it means, harms, and what to do"
    );
    let dead: Vec<_> = sections.difference(&found).collect();
    assert!(dead.is_empty(), "{PAGE} has sections for {dead:?}, which no code gives as a reason");
}

#[test]
fn every_check_that_can_fail_has_a_section() {
    let sections = sections(&page(), "What `tombolo check` says");
    let mut found = BTreeSet::new();
    for (_, code) in sources("ctl/src/command/check") {
        for (at, add) in code.match_indices("lines.add(") {
            let Some((category, rest)) = literal(&code[at + add.len()..]) else { continue };
            match rest.strip_prefix(',').and_then(literal) {
                Some((name, _)) => found.insert(format!("{category} {name}")),
                // Named by a table of its own.
                None => found.insert(format!("{category} IPv4 and IPv6")),
            };
        }
    }
    for (_, code) in sources("ctl/src/command/check") {
        for (at, add) in code.match_indices("lines.found(") {
            found.extend(literal(&code[at + add.len()..]).map(|(name, _)| format!("membership {name}")));
        }
    }
    assert!(found.len() > 12 && found.contains("kernel tun"), "{found:?}");
    let missing: Vec<_> = found.symmetric_difference(&sections).collect();
    assert!(missing.is_empty(), "{PAGE} and `tombolo check` differ in {missing:?}");
}

/// Targets of `[text](target)`, outside of code.
fn links(markdown: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in markdown.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced || line.starts_with("    ") {
            continue;
        }
        // Every second part is `code`.
        for text in line.split('`').step_by(2) {
            for (at, _) in text.match_indices("](") {
                found.extend(text[at + 2..].split_once(')').map(|(target, _)| target.to_owned()));
            }
        }
    }
    found
}

/// As GitHub makes them.
fn anchor(title: &str) -> String {
    let lower = title.to_lowercase();
    let kept = lower.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_leads_somewhere() {
    let mut pages = vec![Path::new(ROOT).join("README.md")];
    files(&Path::new(ROOT).join("docs"), "md", &mut pages);
    let mut dead = Vec::new();
    let mut count = 0;
    for page in pages {
        let text = fs::read_to_string(&page).expect("a page");
        for link in links(&text) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            count += 1;
            let (file, fragment) = link.split_once('#').unwrap_or((&link, ""));
            let target =
                if file.is_empty() { page.clone() } else { page.parent().expect("a directory").join(file) };
            let ends = if fragment.is_empty() {
                target.exists()
            } else {
                fs::read_to_string(&target).is_ok_and(|text| {
                    let mut titles = text.lines().filter(|l| l.starts_with('#'));
                    titles.any(|l| anchor(l.trim_start_matches('#').trim()) == fragment)
                })
            };
            if !ends {
                dead.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(count > 3, "only {count} links were found");
    assert!(dead.is_empty(), "{dead:#?}");
}

#[test]
fn reasons_are_found_however_they_are_written() {
    let code = r#"
        findings.error("One", object, text);
        findings.push(finding(
            "Two",
        Problem::warning(
            "Three", "text"),
        Finding { reason: "Four", object },
        Condition { reason: "Not".to_owned() },
        let text = no_finding("Neither");
        findings.error(reason, object, text);
    "#;
    let expected: BTreeSet<String> = ["Four", "One", "Three", "Two"].map(str::to_owned).into();
    assert_eq!(reasons(code), expected);
    assert_eq!(links("a [b](c.md#d) `[e](f)` [g](h)"), ["c.md#d", "h"]);
    assert_eq!(anchor("What `tombolo check` says"), "what-tombolo-check-says");
}
