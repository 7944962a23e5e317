//! What people write, right and wrong.

use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::*;
use crate::api::directory::document;

#[test]
fn yaml_of_all_sorts_harms_nobody_else() {
    let deep = "a: ".repeat(0) + &"[".repeat(5000);
    let bomb = format!(
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n{}",
        (b'b'..b'i')
            .map(|c| {
                let (this, before) = (c as char, (c - 1) as char);
                format!("{this}: &{this} [{}]\n", vec![format!("*{before}"); 10].join(","))
            })
            .collect::<String>()
    );
    let bad: Vec<(&str, Vec<u8>)> = vec![
        ("tab", b"apiVersion: v1\n\tkind: Service\n".to_vec()),
        ("open", b"apiVersion: v1\nkind: [Service\n".to_vec()),
        ("quote", b"apiVersion: \"v1\nkind: Service\n".to_vec()),
        ("scalar", b"hello\n".to_vec()),
        ("number", b"42\n".to_vec()),
        ("list", b"- a\n- b\n".to_vec()),
        ("nokind", b"apiVersion: v1\nmetadata: {name: a}\n".to_vec()),
        ("kindtype", b"apiVersion: v1\nkind: [Service]\nmetadata: {name: a}\n".to_vec()),
        ("noname", b"apiVersion: v1\nkind: Service\nmetadata: {}\n".to_vec()),
        ("nometa", b"apiVersion: v1\nkind: Service\n".to_vec()),
        ("badname", b"apiVersion: v1\nkind: Service\nmetadata: {name: ../../etc/passwd}\n".to_vec()),
        ("badns", b"apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: ../..}\n".to_vec()),
        ("numname", b"apiVersion: v1\nkind: Service\nmetadata: {name: 12}\n".to_vec()),
        ("port", b"apiVersion: v1\nkind: Service\nmetadata: {name: p}\nspec: {ports: [{port: many}]}\n".to_vec()),
        ("label", b"apiVersion: v1\nkind: Node\nmetadata: {name: n, labels: {tombolo.dev/gateway: true}}\n".to_vec()),
        ("cidr", b"apiVersion: v1\nkind: Node\nmetadata: {name: n}\nspec: {podCIDRs: [10.1.0.7/16]}\n".to_vec()),
        ("dup", b"apiVersion: v1\nkind: Service\nkind: Node\nmetadata: {name: a}\n".to_vec()),
        ("alias", b"apiVersion: *nothing\nkind: Service\n".to_vec()),
        ("deep", deep.into_bytes()),
        ("bomb", bomb.into_bytes()),
        ("latin1", b"apiVersion: v1\nkind: Service\nmetadata: {name: \xe4}\n".to_vec()),
        ("nul", b"apiVersion: v1\nkind: Service\nmetadata: {name: \"a\0b\"}\n".to_vec()),
        ("slice", b"apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s, labels: {kubernetes.io/service-name: a}}\naddressType: IPv4\nendpoints: [{addresses: [fd00::1]}]\n".to_vec()),
        ("sliceless", b"apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s}\naddressType: IPv4\nendpoints: []\n".to_vec()),
        ("beta", b"apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {name: s}\n".to_vec()),
        ("own", b"apiVersion: tombolo.dev/v1alpha1\nkind: Member\nmetadata: {name: m}\n".to_vec()),
    ];
    for (name, bad) in bad {
        let (_temporary, directory) = directory();
        let around =
            [service("before").into_bytes(), bad, service("after").into_bytes()].join(&b"\n---\n"[..]);
        put(&directory, &format!("{name}.yaml"), around);
        put(&directory, "other.yaml", service("other"));
        let observed = directory.read();
        let services = names(&observed);
        assert!(services.contains(&"other".to_owned()), "{name}: {services:?}");
        // Bytes that are no text take their file with them, and nothing else.
        if name != "latin1" {
            assert!(services.contains(&"before".to_owned()), "{name}: {services:?}");
            assert!(services.contains(&"after".to_owned()), "{name}: {services:?}");
        }
        let file = format!("manifests/{name}.yaml");
        let told = observed.findings.iter().any(|f| f.message.contains(&file) && f.message.len() < 1000);
        assert!(told, "{name}: {:?}", observed.findings);
    }
}

#[test]
fn findings_name_the_line_and_the_remedy() {
    let (_temporary, directory) = directory();
    let label =
        "apiVersion: v1\nkind: Node\nmetadata:\n  name: n\n  labels:\n    tombolo.dev/gateway: true\n";
    put(&directory, "a.yaml", format!("# head\n---\n{}---\nx: [\n---\n{label}", service("a")));
    let findings = directory.read().findings;
    let text: Vec<String> = findings.iter().map(|f| format!("{} {}", f.object, f.message)).collect();
    let line = 2 + service("a").lines().count() + 2;
    let place = format!("manifests/a.yaml, line {line}: ");
    assert!(text.iter().any(|t| t.contains("file manifests/a.yaml") && t.contains(&place)), "{text:#?}");
    assert!(text.iter().any(|t| t.contains("Node n") && t.contains("in quotes")), "{text:#?}");
}

#[test]
fn the_last_good_value_stays_until_its_file_is_gone() {
    let (_temporary, directory) = directory();
    let mut reader = Reader::new(directory.root());
    let look = |reader: &mut Reader, file: &str| {
        reader.refresh(&[(reader::Half::Manifests, file.to_owned())].into());
        reader.observed()
    };
    put(&directory, "a.yaml", format!("{}---\n{}", service("a"), service("b")));
    reader.scan(&BTreeSet::new());
    assert_eq!(names(&reader.observed()), ["a", "b"]);

    // One document has no identity any more: nobody knows what went, so nothing goes.
    put(&directory, "a.yaml", format!("x: [\n---\n{}", service("b")));
    let observed = look(&mut reader, "a.yaml");
    assert_eq!(names(&observed), ["a", "b"]);
    assert!(observed.findings.iter().any(|f| f.message.contains("stays in use")));

    // An object that is known to be bad keeps its value; one that was taken out goes.
    put(&directory, "a.yaml", service("a").replace("80", "many"));
    assert_eq!(names(&look(&mut reader, "a.yaml")), ["a"]);

    // Good again, and then gone.
    put(&directory, "a.yaml", service("c"));
    let observed = look(&mut reader, "a.yaml");
    assert_eq!(names(&observed), ["c"]);
    assert_eq!(observed.findings, []);
    put(&directory, "a.yaml", b"\xff\xfe");
    assert_eq!(names(&look(&mut reader, "a.yaml")), ["c"]);
    remove(&directory, "a.yaml");
    let observed = look(&mut reader, "a.yaml");
    assert!(names(&observed).is_empty());
    assert_eq!(observed.findings, []);
}

#[test]
fn the_last_good_value_stays_over_a_restart() {
    let (temporary, directory) = directory();
    let state_dir = temporary.path().join("node");
    let start = || {
        let mut reader = Reader::new(directory.root());
        reader.remember(memory::Memory::new(state_dir.join(MANIFESTS)));
        reader.scan(&BTreeSet::new());
        reader.observed()
    };
    put(&directory, "team/a.yaml", service("a"));
    put(&directory, "b.yaml", service("b"));
    assert_eq!(names(&start()), ["a", "b"]);
    put(&directory, "team/a.yaml", "x: [");
    assert_eq!(names(&start()), ["a", "b"]);
    remove(&directory, "team/a.yaml");
    assert_eq!(names(&start()), ["b"]);
    put(&directory, "team/a.yaml", "x: [");
    assert_eq!(names(&start()), ["b"], "what was removed is not remembered");
}

#[test]
fn a_half_read_directory_is_unknown() {
    let temporary = TempDir::new().unwrap();
    let name = "d".repeat(250);
    let long = (0..12).fold(temporary.path().to_owned(), |path, _| path.join(&name));
    std::fs::create_dir_all(&long).unwrap();
    let directory = Directory::create(long.join("cluster")).unwrap();
    put(&directory, "a.yaml", service("a"));
    assert_eq!(names(&directory.read()), ["a"]);
    // Root too cannot list a directory whose path is too long.
    let deep = (0..7).fold(temporary.path().join("deep"), |path, _| path.join(&name));
    std::fs::create_dir_all(&deep).unwrap();
    let mut running = Reader::new(directory.root());
    running.scan(&BTreeSet::new());
    let unreadable = directory.root().join(MANIFESTS).join("team");
    std::fs::rename(temporary.path().join("deep").join(&name), &unreadable).unwrap();

    let observed = directory.read();
    assert!(!observed.services.is_known() && !observed.exports.is_known(), "part of it is not all of it");
    assert!(observed.findings.iter().any(|f| f.reason == "DirectoryIncomplete"));
    running.scan(&BTreeSet::new());
    assert_eq!(names(&running.observed()), ["a"], "who knew it before goes on");
    let mut started = Reader::new(directory.root());
    assert!(started.scan(&BTreeSet::new()), "looks again soon");
    std::fs::rename(&unreadable, temporary.path().join("away")).unwrap();
    started.scan(&BTreeSet::new());
    assert_eq!(names(&started.observed()), ["a"]);
}

#[tokio::test]
async fn a_damaged_object_of_ours_is_not_one_that_is_gone() {
    let (_temporary, directory) = directory();
    put(&directory, "a.yaml", service("a") + "---\n" + &export("a"));
    directory.stamp_exports(1000).await.unwrap();
    assert_eq!(directory.read().exports.get().unwrap()[&key("production/a")].created, 1000);
    let path = directory.root().join(STATE).join(reader::state_path(&ObjectId {
        kind: Kind::ServiceExport,
        namespace: Some("production".parse().unwrap()),
        name: kind::ObjectName::new("a").unwrap(),
    }));
    let good = std::fs::read(&path).unwrap();
    std::fs::write(&path, "half an obj").unwrap();
    let observed = directory.read();
    assert!(!observed.exports.is_known(), "it would be made anew, and younger than it is");
    assert!(!observed.members.is_known());
    std::fs::write(&path, good).unwrap();
    assert_eq!(directory.read().exports.get().unwrap()[&key("production/a")].created, 1000);
}

#[test]
fn order_does_not_matter() {
    let documents = [
        service("a"),
        service("b"),
        export("a"),
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: empty}\n".to_owned(),
        slice("a-1", "a", "IPv4", "10.1.0.1"),
        slice("a-2", "a", "IPv6", "fd00::1"),
        slice("a-3", "a", "IPv4", "10.1.0.2"),
        "x: [\n".to_owned(),
    ];
    let mut results = Vec::new();
    for turn in 0..documents.len() {
        let (_temporary, directory) = directory();
        let mut reader = Reader::new(directory.root());
        for step in 0..documents.len() {
            // The same files, made and seen in another order.
            let number = (turn + step * 3) % documents.len();
            put(&directory, &format!("{number}.yaml"), &documents[number]);
            reader.scan(&BTreeSet::new());
            reader.refresh(&[(reader::Half::Manifests, format!("{number}.yaml"))].into());
        }
        let observed = reader.observed();
        assert_eq!(observed, directory.read());
        results.push(observed);
    }
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    let observed = &results[0];
    assert_eq!(observed.backends.get().unwrap()[&key("production/a")].len(), 1);
    assert_eq!(observed.services.get().unwrap()[&key("production/a")].families.len(), 2);
}

fn slice(name: &str, service: &str, family: &str, address: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}\n  namespace: production\n  labels: {{kubernetes.io/service-name: {service}}}\naddressType: {family}\nports: [{{port: 80}}]\nendpoints: [{{addresses: [\"{address}\"]}}]\n"
    )
}

#[test]
fn the_first_of_two_counts() {
    let (_temporary, directory) = directory();
    put(&directory, "b.yaml", service("a").replace("80", "8080"));
    put(&directory, "a.yaml", service("a"));
    let observed = directory.read();
    assert_eq!(observed.services.get().unwrap()[&key("production/a")].ports[0].port, 80);
    let finding = observed.findings.iter().find(|f| f.reason == "DuplicateObject").unwrap();
    assert!(finding.message.contains("manifests/b.yaml") && finding.message.contains("manifests/a.yaml"));
}

#[test]
fn lists_json_and_namespaces() {
    let (_temporary, directory) = directory();
    put(
        &directory,
        "deep/er/list.json",
        r#"{"apiVersion":"v1","kind":"List","items":[
            {"apiVersion":"v1","kind":"Service","metadata":{"name":"j"},"spec":{"ports":[{"port":80}]}},
            {"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"x"}}]}"#,
    );
    put(&directory, "crlf.yml", service("crlf").replace('\n', "\r\n") + "---\r\n" + &service("crlf2"));
    put(&directory, "bom.yaml", format!("\u{feff}{}", service("bom")));
    put(&directory, "directive.yaml", format!("%YAML 1.2\n--- # first\n{}...\n", service("directive")));
    put(&directory, "notes.txt", "not for us: [");
    put(&directory, ".hidden.yaml", "x: [");
    put(&directory, "a.yaml~", "x: [");
    put(&directory, "empty.yaml", "");
    put(&directory, "comments.yaml", "# nothing\n---\n# here\n---\nnull\n");
    let observed = directory.read();
    assert_eq!(observed.findings, []);
    assert_eq!(names(&observed), ["j", "bom", "crlf", "crlf2", "directive"]);
    let namespaces: Vec<_> = observed.namespaces.get().unwrap().iter().map(|n| n.as_str()).collect();
    assert_eq!(namespaces, ["default", "production"]);
}

#[test]
fn only_regular_files_of_this_directory_are_read() {
    let (temporary, directory) = directory();
    let outside = temporary.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("a.yaml"), service("outside")).unwrap();
    let manifests = directory.root().join(MANIFESTS);
    symlink(outside.join("a.yaml"), manifests.join("link.yaml")).unwrap();
    symlink(&outside, manifests.join("dir")).unwrap();
    nix::unistd::mkfifo(&manifests.join("fifo.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::fs::create_dir(manifests.join("folder.yaml")).unwrap();
    let large = std::fs::File::create(manifests.join("large.yaml")).unwrap();
    large.set_len(tree::MAX_BYTES + 1).unwrap();
    put(&directory, "good.yaml", service("good"));
    let observed = directory.read();
    assert_eq!(names(&observed), ["good"]);
    for (reason, file) in [("SymbolicLink", "link.yaml"), ("FileTooLarge", "large.yaml")] {
        let told = observed.findings.iter().any(|f| f.reason == reason && f.message.contains(file));
        assert!(told, "{reason}: {:#?}", observed.findings);
    }
    // Nor through a link that replaced a directory after it was listed.
    assert!(tree::read(&manifests, "dir/a.yaml").is_err());
    assert!(tree::read(&manifests, "../../outside/a.yaml").is_err());
}

#[test]
fn mcs_old_exports_are_accepted_with_a_warning() {
    let (_temporary, directory) = directory();
    put(
        &directory,
        "a.yaml",
        "apiVersion: submariner.io/v1\nkind: ServiceExport\nmetadata:\n  name: nginx\n  namespace: web\n---\napiVersion: lighthouse.submariner.io/v2alpha1\nkind: ServiceImport\nmetadata:\n  name: nginx\n  namespace: web\nspec:\n  type: SuperClusterIP\n",
    );
    let observed = directory.read();
    assert!(observed.declared_exports.get().unwrap().contains(&key("web/nginx")));
    let reasons: Vec<_> = observed.findings.iter().map(|f| f.reason).collect();
    assert_eq!(reasons, ["OldManifest", "ServiceImportByHand"]);
    assert!(observed.imports.get().unwrap().is_empty());
}

#[test]
fn the_examples_of_the_docs_are_good() {
    let docs = include_str!("../../../../../docs/directory.md");
    let mut count = 0;
    for (number, block) in docs.split("```yaml\n").skip(1).enumerate() {
        let (_temporary, directory) = directory();
        let text = block.split("```").next().unwrap();
        put(&directory, &format!("example-{number}.yaml"), text);
        let observed = directory.read();
        assert_eq!(observed.findings, [], "{text}");
        let objects = observed.services.get().unwrap().len()
            + observed.nodes.get().unwrap().len()
            + observed.declared_exports.get().unwrap().len();
        assert!(objects > 0, "{text}");
        count += 1;
    }
    assert!(count >= 2);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        document::parse("manifests/a.yaml", &bytes);
        document::parse("manifests/a.json", &bytes);
    }

    #[test]
    fn no_text_like_yaml_panics(
        parts in proptest::collection::vec(
            prop::sample::select(vec![
                "---\n", "...\n", "a: ", "- ", "\n", "  ", "&x ", "*x", "[", "]", "{", "}", "|\n", ">\n", "!!str ",
                "\"", "'", "apiVersion: v1\n", "kind: Service\n", "metadata:\n", "  name: a\n", "null", "? ", ": ",
                "<<: *x\n", "%YAML 1.2\n", "\t", "# c\n", "\r\n", "\u{feff}", "0x1", ".nan",
            ]),
            0..40,
        )
    ) {
        document::parse("manifests/a.yaml", parts.concat().as_bytes());
    }

    /// A broken document in any place never takes a good one with it.
    #[test]
    fn documents_stand_alone(junk in "[ -~\n]{0,60}", at in 0..4_usize) {
        let junk = junk.replace("---", "").replace("...", "");
        let mut documents = vec![service("a"), service("b"), service("c")];
        documents.insert(at, junk);
        let parsed = document::parse("manifests/a.yaml", documents.join("\n---\n").as_bytes());
        prop_assert_eq!(parsed.items.len(), 3);
    }

    #[test]
    fn parts_cover_the_text(text in "(---|\\.\\.\\.|\n|a: b|#|\r| ){0,30}") {
        let mut last = 0;
        for part in document::split(&text) {
            prop_assert!(part.range.start >= last && part.range.end >= part.range.start);
            let between = &text[last..part.range.start];
            prop_assert!(between.trim_end_matches([' ', '\t', '\r', '\n']).len() <= 3 || between.starts_with("..."));
            last = part.range.end;
        }
        prop_assert_eq!(last, text.len());
    }
}

#[test]
fn findings_hold_nothing_that_a_terminal_obeys() {
    let (_temporary, directory) = directory();
    put(&directory, "a\u{1b}[2J.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: \"\\e[2J\"}\n");
    put(&directory, "b.yaml", "\u{1b}]0;x\u{7}: [");
    put(
        &directory,
        "c.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: c}\nspec: {type: 1, \"\\e[2J\": 1}\n",
    );
    let findings = directory.read().findings;
    assert!(findings.len() >= 3, "{findings:#?}");
    for finding in findings {
        let text = format!("{}{}", finding.object, finding.message);
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
    }
}
