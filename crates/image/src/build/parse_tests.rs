use super::*;
use proptest::prelude::*;

fn steps(text: &str) -> Vec<Instruction> {
    let parsed = parse("C", &format!("FROM scratch\n{text}")).unwrap();
    parsed.stages.into_iter().next().unwrap().steps.into_iter().map(|s| s.instruction).collect()
}

fn refusal(text: &str) -> String {
    parse("C", text).unwrap_err().to_string()
}

fn only(text: &str) -> Instruction {
    let mut all = steps(text);
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

#[test]
fn stages_have_names_and_bases() {
    let parsed = parse(
        "C",
        "# syntax=docker/dockerfile:1\nARG V=1\n\nFROM --platform=linux/amd64 a:$V AS Build\nRUN x\nfrom build\nCMD y\n",
    )
    .unwrap();
    assert_eq!(parsed.args, [(2, vec![("V".to_owned(), Some("1".to_owned()))])]);
    let [one, two] = parsed.stages.as_slice() else { panic!() };
    assert_eq!(
        (one.base.as_str(), one.name.as_deref(), one.platform.as_deref()),
        ("a:$V", Some("build"), Some("linux/amd64"))
    );
    assert_eq!((two.base.as_str(), two.line, two.steps[0].line), ("build", 6, 7));
}

#[test]
fn lines_are_continued() {
    let Instruction::Run(run) = only("RUN a && \\\n  # a comment\n\n  b \\\n  c\n") else { panic!() };
    assert_eq!(run.command, Command::Shell("a &&   b   c".into()));
    let parsed = parse("C", "# escape=`\nFROM scratch\nRUN a `\n b\\\nUSER c\n").unwrap();
    assert_eq!(parsed.stages[0].steps.len(), 2);
    assert_eq!(parsed.stages[0].steps[1].line, 5);
}

#[test]
fn forms_of_commands() {
    assert_eq!(only(r#"CMD ["a", "b c"]"#), Instruction::Cmd(Command::Exec(vec!["a".into(), "b c".into()])));
    assert_eq!(only("CMD a b"), Instruction::Cmd(Command::Shell("a b".into())));
    assert_eq!(only("ENTRYPOINT ['a']"), Instruction::Entrypoint(Command::Shell("['a']".into())));
    assert_eq!(only(r#"SHELL ["/bin/bash", "-c"]"#), Instruction::Shell(vec!["/bin/bash".into(), "-c".into()]));
    let pair = |n: &str, v: &str| (n.to_owned(), v.to_owned());
    assert_eq!(only("ENV A=1 B=\"2 3\""), Instruction::Env(vec![pair("A", "1"), pair("B", "\"2 3\"")]));
    assert_eq!(only("ENV A  the rest = of it"), Instruction::Env(vec![pair("A", "the rest = of it")]));
    assert_eq!(only("VOLUME /a /b"), Instruction::Volume(vec!["/a".into(), "/b".into()]));
    assert!(matches!(only("ONBUILD COPY . /app"), Instruction::OnBuild(text) if text == "COPY . /app"));
}

#[test]
fn flags_of_copy_and_run() {
    let Instruction::Copy(copy) = only("COPY --from=build --chown=1:2 --chmod=755 --link a b /dst/") else { panic!() };
    assert_eq!(
        (copy.from.as_deref(), copy.chown.as_deref(), copy.chmod.as_deref()),
        (Some("build"), Some("1:2"), Some("755"))
    );
    assert_eq!((copy.sources, copy.destination.as_str()), (vec!["a".to_owned(), "b".to_owned()], "/dst/"));
    let Instruction::Run(run) = only("RUN --mount=type=cache,target=/c --network=none make --jobs=2") else { panic!() };
    assert_eq!((run.mounts, run.network.as_deref()), (vec!["type=cache,target=/c".to_owned()], Some("none")));
    assert_eq!(run.command, Command::Shell("make --jobs=2".into()));
}

#[test]
fn heredocs() {
    let Instruction::Run(run) = only("RUN <<EOF\necho a\n  $B\nEOF\n") else { panic!() };
    assert_eq!(run.script.as_deref(), Some("echo a\n  $B\n"));
    let Instruction::Run(run) = only("RUN python3 <<-'END' && echo\n\tprint(1)\n\tEND\n") else { panic!() };
    assert_eq!(run.command, Command::Shell("python3 <<-'END' && echo\nprint(1)\nEND\n".into()));
    let Instruction::Copy(copy) = only("COPY <<a <<'b' /d/\n1\na\n2 $X\nb\n") else { panic!() };
    assert_eq!(copy.heredocs.len(), 2);
    assert_eq!((copy.heredocs[0].content.as_str(), copy.heredocs[0].expand), ("1\n", true));
    assert_eq!((copy.heredocs[1].content.as_str(), copy.heredocs[1].expand), ("2 $X\n", false));
    // Neither a shift nor a here-string.
    let Instruction::Run(run) = only("RUN echo $((1<<2)) '<<A' x<<<y") else { panic!() };
    assert!(run.script.is_none());
}

#[test]
fn errors_name_file_and_line() {
    for (text, line, why) in [
        ("", 1, "no FROM"),
        ("RUN x", 1, "before the first FROM"),
        ("FROM a\n\nRUM x", 3, "no instruction \"RUM\""),
        ("FROM a AS b\nFROM c AS B", 2, "from line 1"),
        ("FROM a b", 1, "FROM takes"),
        ("FROM a\nCOPY a", 2, "needs sources"),
        ("FROM a\nCOPY a b c", 2, "write \"c/\""),
        ("FROM a\nRUN <<EOF\nx", 2, "EOF"),
        ("FROM a\nCOPY --form=x a b", 2, "--form"),
        ("FROM a\nSHELL bash", 2, "JSON"),
        ("FROM a\nONBUILD FROM b", 2, "triggered"),
        ("FROM a\nENV A=\"b", 2, "not closed"),
        ("# escape=x\nFROM a", 1, "escape"),
        ("FROM a\nARG 1a", 2, "variable"),
    ] {
        let said = refusal(text);
        assert!(said.starts_with(&format!("C:{line}: ")) && said.contains(why), "{text:?}: {said}");
    }
}

proptest! {
    #[test]
    fn never_panics(text in "(FROM|RUN|COPY|ENV|HEALTHCHECK|ONBUILD|[ -~\n<\\\\#]|\n|<<E\n|E\n|--mount=|\\[\"a\"\\]){0,30}") {
        let _ = parse("C", &text);
        let _ = parse("C", &format!("FROM a\n{text}"));
        let _ = trigger(&text);
    }

    #[test]
    fn however_it_is_spread_over_lines_it_is_the_same(words in proptest::collection::vec("[a-z]{1,5}", 1..8), breaks in any::<u8>()) {
        let one = format!("RUN {}", words.join(" "));
        let mut spread = "RUN".to_owned();
        for (at, word) in words.iter().enumerate() {
            spread.push_str(if breaks >> (at % 8) & 1 == 1 { " \\\n# aside\n" } else { " " });
            spread.push_str(word);
        }
        prop_assert_eq!(steps(&one), steps(&spread));
    }
}
