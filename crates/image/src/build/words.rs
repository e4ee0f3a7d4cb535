//! Words, quotes and variables, as a Containerfile has them.

use super::pattern::Pattern;

/// Bytes that replacing variables may make of one value: `ENV A=$A$A` doubles with each line.
const VALUE_LIMIT: usize = 1 << 20;
const DEPTH: usize = 50;

type Done<T> = std::result::Result<T, String>;
pub(crate) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Splits at white space outside of quotes. Quotes and escapes stay for [`expand`].
pub(crate) fn split(text: &str, escape: char) -> Done<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (None, '"' | '\'') => quote = Some(c),
            (None, c) if c.is_whitespace() => {
                words.extend(word.take());
                continue;
            }
            _ => {}
        }
        let word = word.get_or_insert_default();
        word.push(c);
        if c == escape && quote != Some('\'') {
            word.extend(chars.next());
        }
    }
    if let Some(quote) = quote {
        return Err(format!("a quote {quote} is not closed"));
    }
    words.extend(word);
    Ok(words)
}

/// Replaces variables and takes quotes away.
pub(crate) fn expand(text: &str, escape: char, lookup: Lookup) -> Done<String> {
    Expander { chars: text.chars().collect(), at: 0, escape, lookup, quotes: true }.all()
}

/// Replaces variables; quotes are text (heredocs).
pub(crate) fn expand_text(text: &str, escape: char, lookup: Lookup) -> Done<String> {
    Expander { chars: text.chars().collect(), at: 0, escape, lookup, quotes: false }.all()
}

struct Expander<'a> {
    chars: Vec<char>,
    at: usize,
    escape: char,
    lookup: Lookup<'a>,
    quotes: bool,
}

impl Expander<'_> {
    fn all(mut self) -> Done<String> {
        self.until(None, 0)
    }

    fn next(&mut self) -> Option<char> {
        let c = self.chars.get(self.at).copied();
        self.at += usize::from(c.is_some());
        c
    }

    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    /// Up to a closing brace, if one is wanted.
    fn until(&mut self, end: Option<char>, depth: usize) -> Done<String> {
        if depth > DEPTH {
            return Err(format!("variables nested more than {DEPTH} deep"));
        }
        let mut out = String::new();
        loop {
            match self.next() {
                None if end.is_some() => return Err("${ without its }".into()),
                None => return Ok(out),
                c if c == end => return Ok(out),
                Some('\'') if self.quotes => loop {
                    match self.next() {
                        Some('\'') => break,
                        Some(c) => out.push(c),
                        None => return Err("a quote ' is not closed".into()),
                    }
                },
                Some('"') if self.quotes => self.double(&mut out, depth)?,
                Some('$') => self.variable(&mut out, depth)?,
                Some(c) if c == self.escape => match (self.next(), self.quotes) {
                    (Some(c), true) | (Some(c @ '$'), false) => out.push(c),
                    (Some(c), false) => out.extend([self.escape, c]),
                    (None, _) => out.push(self.escape),
                },
                Some(c) => out.push(c),
            }
            if out.len() > VALUE_LIMIT {
                return Err(format!("becomes longer than {VALUE_LIMIT} bytes once variables are replaced"));
            }
        }
    }

    fn double(&mut self, out: &mut String, depth: usize) -> Done<()> {
        loop {
            match self.next() {
                Some('"') => return Ok(()),
                Some('$') => self.variable(out, depth)?,
                Some(c) if c == self.escape => match self.next() {
                    Some(c @ ('"' | '$')) => out.push(c),
                    Some(c) if c == self.escape => out.push(c),
                    Some(c) => out.extend([self.escape, c]),
                    None => out.push(self.escape),
                },
                Some(c) => out.push(c),
                None => return Err("a quote \" is not closed".into()),
            }
        }
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        while let Some(c) = self.peek().filter(|c| c.is_ascii_alphanumeric() || *c == '_') {
            // `$1` is one digit.
            if name.is_empty() && c.is_ascii_digit() {
                self.at += 1;
                return c.to_string();
            }
            name.push(c);
            self.at += 1;
        }
        name
    }

    fn variable(&mut self, out: &mut String, depth: usize) -> Done<()> {
        if self.peek() != Some('{') {
            let name = self.name();
            match name.as_str() {
                "" => out.push('$'),
                name => out.push_str(&(self.lookup)(name).unwrap_or_default()),
            }
            return Ok(());
        }
        self.at += 1;
        let name = self.name();
        if name.is_empty() {
            return Err("${ is followed by no variable's name".into());
        }
        let value = (self.lookup)(&name);
        let operator = self.next().ok_or("${ without its }")?;
        if operator == '}' {
            out.push_str(&value.unwrap_or_default());
            return Ok(());
        }
        let colon = operator == ':';
        let operator = if colon { self.next().ok_or("${ without its }")? } else { operator };
        let greedy = !colon && matches!(operator, '#' | '%') && self.peek() == Some(operator);
        self.at += usize::from(greedy);
        let word = self.until(Some('}'), depth + 1)?;
        let set = value.as_ref().is_some_and(|v| !colon || !v.is_empty());
        match operator {
            '-' => out.push_str(if set { value.as_deref().unwrap_or_default() } else { &word }),
            '+' => out.push_str(if set { &word } else { "" }),
            '?' if set => out.push_str(value.as_deref().unwrap_or_default()),
            '?' if word.is_empty() => return Err(format!("{name} is not set; give it with --build-arg")),
            '?' => return Err(format!("{name}: {word}")),
            '#' | '%' if !colon => {
                out.push_str(&trimmed(&value.unwrap_or_default(), &word, operator == '#', greedy)?);
            }
            other => return Err(format!("${{{name}{other}: no such operator; there are :- :+ :? - + ? # ## % %%")),
        }
        Ok(())
    }
}

/// `${name#pattern}` and its three siblings.
fn trimmed(value: &str, pattern: &str, front: bool, greedy: bool) -> Done<String> {
    let pattern = Pattern::shell(pattern)?;
    let mut cuts: Vec<usize> = value.char_indices().map(|(at, _)| at).chain([value.len()]).collect();
    if front == greedy {
        cuts.reverse();
    }
    for cut in cuts {
        let (head, tail) = value.split_at(cut);
        if pattern.matches(if front { head } else { tail }) {
            return Ok(if front { tail } else { head }.to_owned());
        }
    }
    Ok(value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(text: &str) -> Done<String> {
        let lookup = |name: &str| match name {
            "A" => Some("one".to_owned()),
            "EMPTY" => Some(String::new()),
            "PATHS" => Some("/usr/local/bin".to_owned()),
            _ => None,
        };
        expand(text, '\\', &lookup)
    }

    #[test]
    fn variables_and_quotes() {
        for (text, expected) in [
            ("$A-${A}x", "one-onex"),
            ("'$A' \"$A\" \\$A", "$A one $A"),
            ("\"a\\\"b\\nc\"", "a\"b\\nc"),
            ("${N:-x} ${EMPTY:-y} ${EMPTY-z}.", "x y ."),
            ("${A:+set}${N:+set}${EMPTY+e}", "sete"),
            ("${N:-${A}$A}", "oneone"),
            ("${PATHS##*/} ${PATHS#*/} ${PATHS%/*} ${PATHS%%/*}.", "bin usr/local/bin /usr/local ."),
            ("100$ $", "100$ $"),
            ("", ""),
        ] {
            assert_eq!(of(text).as_deref(), Ok(expected), "{text}");
        }
        assert!(of("${N:?give one}").unwrap_err().contains("give one"));
        for bad in ["${A", "${", "${}", "'a", "\"a", "${A^}"] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn heredocs_keep_their_quotes() {
        let lookup = |name: &str| (name == "A").then(|| "1".to_owned());
        assert_eq!(expand_text("\"$A\" '\\$A' \\n", '\\', &lookup).unwrap(), "\"1\" '$A' \\n");
    }

    #[test]
    fn doubling_ends() {
        let long = "x".repeat(VALUE_LIMIT);
        let lookup = |_: &str| Some(long.clone());
        assert!(expand("$A$A", '\\', &lookup).unwrap_err().contains("longer than"));
        assert!(of(&format!("{}x{}", "${N:-".repeat(60), "}".repeat(60))).unwrap_err().contains("nested"));
    }

    #[test]
    fn splitting() {
        assert_eq!(split("a=\"b c\" d\\ e 'f g'", '\\').unwrap(), ["a=\"b c\"", "d\\ e", "'f g'"]);
        assert!(split("a \"b", '\\').is_err());
    }

    proptest! {
        #[test]
        fn never_panics(text in "[$AN{}:#%?+'\"\\\\ a*\\[-]{0,40}") {
            let _ = of(&text);
            let _ = split(&text, '\\');
        }

        #[test]
        fn plain_text_is_itself(text in "[a-z0-9/._ ]{0,40}") {
            prop_assert_eq!(of(&text).unwrap(), text);
        }
    }
}
