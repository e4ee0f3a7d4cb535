//! From a file's lines to instructions with what follows them: directives, comments, continuation, heredocs.

/// One instruction, put together from its lines.
#[derive(Debug)]
pub(crate) struct Logical {
    /// Of its first line, from 1.
    pub number: usize,
    /// In capitals.
    pub keyword: String,
    pub rest: String,
    pub heredocs: Vec<Heredoc>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Heredoc {
    pub name: String,
    pub content: String,
    /// Its name was not quoted: variables in it are replaced.
    pub expand: bool,
}

impl Logical {
    /// For people, on one line.
    pub fn shown(&self) -> String {
        let rest: Vec<&str> = self.rest.split_whitespace().collect();
        format!("{} {}", self.keyword, rest.join(" "))
    }

    /// With its heredocs.
    pub fn whole_rest(&self) -> String {
        let mut text = self.rest.clone();
        for heredoc in &self.heredocs {
            text.push_str(&format!("\n{}{}", heredoc.content, heredoc.name));
        }
        text
    }
}

type Failure = (usize, String);

/// The escape character and the instructions.
pub(crate) fn split(text: &str) -> Result<(char, Vec<Logical>), Failure> {
    let lines: Vec<&str> = text.lines().collect();
    let escape = escape(&lines)?;
    let mut found = Vec::new();
    let mut next = 0;
    while let Some(line) = lines.get(next) {
        if is_blank(line) {
            next += 1;
            continue;
        }
        let number = next + 1;
        let mut text = String::new();
        while let Some(line) = lines.get(next) {
            next += 1;
            // Comments and empty lines within an instruction are no part of it.
            if !text.is_empty() && is_blank(line) {
                continue;
            }
            match continued(line, escape) {
                Some(part) => text.push_str(part),
                None => {
                    text.push_str(line);
                    break;
                }
            }
        }
        if text.contains('\0') {
            return Err((number, "has a zero byte in it".into()));
        }
        let text = text.trim();
        let (keyword, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let mut logical =
            Logical { number, keyword: keyword.to_uppercase(), rest: rest.trim().to_owned(), heredocs: Vec::new() };
        if takes_heredocs(&logical) {
            for (name, expand, tabs) in markers(&logical.rest) {
                let content = heredoc(&lines, &mut next, &name, tabs)
                    .ok_or((number, format!("heredoc {name} has no line {name:?} that ends it")))?;
                logical.heredocs.push(Heredoc { name, content, expand });
            }
        }
        found.push(logical);
    }
    Ok((escape, found))
}

/// Directives stand in the first lines, before anything else.
fn escape(lines: &[&str]) -> Result<char, Failure> {
    let mut escape = '\\';
    for (at, line) in lines.iter().enumerate() {
        let Some((name, value)) = line.trim().strip_prefix('#').and_then(|d| d.split_once('=')) else { break };
        match name.trim().to_ascii_lowercase().as_str() {
            "escape" => match value.trim() {
                "\\" => escape = '\\',
                "`" => escape = '`',
                other => return Err((at + 1, format!("escape={other}: it is \\ or `"))),
            },
            "syntax" | "check" => {}
            _ => break,
        }
    }
    Ok(escape)
}

fn is_blank(line: &str) -> bool {
    let line = line.trim_start();
    line.is_empty() || line.starts_with('#')
}

/// The line without its escape character, if it goes on in the next.
fn continued(line: &str, escape: char) -> Option<&str> {
    let line = line.trim_end();
    let run = line.chars().rev().take_while(|c| *c == escape).count();
    if run % 2 == 1 { line.strip_suffix(escape) } else { None }
}

fn takes_heredocs(line: &Logical) -> bool {
    let rest = line.rest.trim_start();
    match line.keyword.as_str() {
        "RUN" | "COPY" | "ADD" => !rest.starts_with('['),
        "ONBUILD" => ["RUN", "COPY", "ADD"]
            .iter()
            .any(|k| rest.get(..k.len()).is_some_and(|r| r.eq_ignore_ascii_case(k)) && !rest.trim_end().ends_with(']')),
        _ => false,
    }
}

/// Whether a word is `<<NAME` or `<<-NAME`, the name quoted or not.
pub(crate) fn is_marker(word: &str) -> bool {
    marker(word).is_some()
}

fn marker(word: &str) -> Option<(String, bool, bool)> {
    let after = word.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix("<<")?;
    let (tabs, name) = match after.strip_prefix('-') {
        Some(name) => (true, name),
        None => (false, after),
    };
    let quoted = ['"', '\''].iter().find_map(|q| name.strip_prefix(*q)?.strip_suffix(*q));
    let bare = quoted.unwrap_or(name);
    let fine = bare.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bare.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    fine.then(|| (bare.to_owned(), quoted.is_none(), tabs))
}

/// Heredocs that a line begins: name, whether variables are replaced, whether leading tabs go.
fn markers(text: &str) -> Vec<(String, bool, bool)> {
    let mut found = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    for c in text.chars().chain([' ']) {
        match (quote, c) {
            (Some(q), c) if c == q => {
                quote = None;
                word.push(c);
            }
            (None, '"' | '\'') => {
                quote = Some(c);
                word.push(c);
            }
            (None, c) if c.is_whitespace() => {
                found.extend(marker(&word));
                word.clear();
            }
            _ => word.push(c),
        }
    }
    found
}

fn heredoc(lines: &[&str], next: &mut usize, name: &str, tabs: bool) -> Option<String> {
    let mut content = String::new();
    loop {
        let line = lines.get(*next)?;
        *next += 1;
        let line = if tabs { line.trim_start_matches('\t') } else { line };
        if line == name {
            return Some(content);
        }
        content.push_str(line);
        content.push('\n');
    }
}
