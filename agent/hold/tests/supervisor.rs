//! One supervisor and a shell as its child. A single test: a supervisor reaps every child of its process.

use std::io::Read;
use std::time::{Duration, Instant};

use tombolo_hold::{Event, Supervisor};

/// Appends a line to the held descriptor `log`.
const LINE: &str = r#"fd=${TOMBOLO_HELD##*,log=}; echo line >>"/proc/self/fd/${fd%%,*}";"#;

/// To this thread, which has the signal blocked, and no other of the test's process.
fn terminate_this_thread() {
    // SAFETY: a signal number and the calling thread, which exists.
    assert_eq!(unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGTERM) }, 0);
}

#[test]
fn a_child_that_dies_finds_its_descriptors_again() {
    let path = tempfile::NamedTempFile::new().unwrap();
    let script =
        format!(r#"{LINE} [ "$(wc -l <{})" -ge 5 ] && exit 7; kill -KILL $$"#, path.path().display());
    let mut supervisor = Supervisor::program("/bin/sh", ["-c", &script]);
    supervisor.hold("log", path.reopen().unwrap()).unwrap().final_codes([7]);
    let (mut started, mut died) = (0, 0);
    let begun = Instant::now();
    let code = supervisor.run(|event| match event {
        Event::Started { .. } => started += 1,
        Event::Died { how, restart_in } => {
            assert!(how.contains("KILL"), "{how}");
            assert_eq!(restart_in, Duration::ZERO);
            died += 1;
        }
        Event::Failed { error, .. } => panic!("{error}"),
    });
    assert_eq!((code.unwrap(), started, died), (7, 5, 4));
    assert!(begun.elapsed() < Duration::from_secs(5));
    let mut text = String::new();
    path.reopen().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "line\n".repeat(5));

    // SIGTERM goes to the child, whose exit code is the supervisor's.
    let mut supervisor =
        Supervisor::program("/bin/sh", ["-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done"]);
    let code = supervisor.run(|event| {
        if let Event::Started { .. } = event {
            terminate_this_thread();
        }
    });
    // Either the trap ran, or the signal came before the shell had set it.
    assert!(matches!(code.unwrap(), 3 | 143));

    // One that retires is followed by another before it ends; how it ends is nobody's business.
    let path = tempfile::NamedTempFile::new().unwrap();
    let retire = r#"k=${TOMBOLO_HELD#*_keeper=}; k=${k%%,*}; printf retire >&$k; dd bs=16 count=1 <&$k >/dev/null 2>&1;"#;
    let script =
        format!(r#"{LINE} [ "$(wc -l <{})" -ge 2 ] && exit 7; {retire} exec sleep 2"#, path.path().display());
    let mut supervisor = Supervisor::program("/bin/bash", ["-c", &script]);
    supervisor.hold("log", path.reopen().unwrap()).unwrap().final_codes([7]);
    let (mut started, begun) = (0, Instant::now());
    let code = supervisor.run(|event| match event {
        Event::Started { .. } => started += 1,
        other => panic!("{other:?}"),
    });
    assert_eq!((code.unwrap(), started), (7, 2));
    assert!(begun.elapsed() < Duration::from_millis(1500));

    // One that does not heed it is killed.
    let mut supervisor = Supervisor::program("/bin/sh", ["-c", "trap '' TERM; while :; do sleep 0.05; done"]);
    supervisor.grace(Duration::from_millis(300));
    let begun = Instant::now();
    let code = supervisor.run(|event| {
        if let Event::Started { .. } = event {
            terminate_this_thread();
        }
    });
    assert!(matches!(code.unwrap(), 137 | 143));
    assert!(begun.elapsed() < Duration::from_secs(5));
}
