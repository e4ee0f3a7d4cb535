//! Patterns of file names: those of `COPY` sources, of ignore files, and of the shell. Matching takes time in proportion
//! to pattern times text, whatever the pattern.

#[derive(Clone, Debug)]
enum Token {
    One(char),
    /// `?`.
    Any,
    /// `[a-z]`; ranges, and whether it is negated.
    Class(Vec<(char, char)>, bool),
    /// `*`: any run.
    Run,
    /// `**/`: any directories, or none.
    Directories,
    /// `**` at the end: anything.
    Rest,
}

#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    tokens: Vec<Token>,
    /// `*`, `?` and classes stop at slashes.
    path: bool,
}

const LENGTH: usize = 4096;

impl Pattern {
    /// For paths (Go's `filepath.Match`, with `**`).
    pub fn path(text: &str) -> Result<Pattern, String> {
        Ok(Pattern { tokens: tokens(text, true)?, path: true })
    }

    /// For any text.
    pub fn shell(text: &str) -> Result<Pattern, String> {
        Ok(Pattern { tokens: tokens(text, false)?, path: false })
    }

    pub fn has_wildcards(text: &str) -> bool {
        text.contains(['*', '?', '['])
    }

    pub fn matches(&self, text: &str) -> bool {
        let any = |c: char| !self.path || c != '/';
        let mut states = vec![false; self.tokens.len() + 1];
        self.enter(&mut states, 0);
        for c in text.chars() {
            let mut next = vec![false; states.len()];
            for (at, token) in self.tokens.iter().enumerate().filter(|(at, _)| states.get(*at) == Some(&true)) {
                let moves = match token {
                    Token::One(one) => *one == c,
                    Token::Any => any(c),
                    Token::Class(ranges, negated) => {
                        any(c) && ranges.iter().any(|(low, high)| (*low..=*high).contains(&c)) != *negated
                    }
                    Token::Run => any(c) && self.enter(&mut next, at),
                    Token::Rest => self.enter(&mut next, at),
                    // Once begun it is left after a slash only, so it is not entered anew.
                    Token::Directories => {
                        if let Some(slot) = next.get_mut(at) {
                            *slot = true;
                        }
                        c == '/'
                    }
                };
                if moves {
                    self.enter(&mut next, at + 1);
                }
            }
            states = next;
        }
        states.last() == Some(&true)
    }

    /// Comes to a token, and past it if it may match nothing.
    fn enter(&self, states: &mut [bool], mut at: usize) -> bool {
        loop {
            if let Some(slot) = states.get_mut(at) {
                *slot = true;
            }
            match self.tokens.get(at) {
                Some(Token::Run | Token::Rest | Token::Directories) => at += 1,
                Some(Token::One(_) | Token::Any | Token::Class(..)) | None => return false,
            }
        }
    }
}

fn tokens(text: &str, path: bool) -> Result<Vec<Token>, String> {
    if text.len() > LENGTH {
        return Err(format!("a pattern of more than {LENGTH} bytes"));
    }
    let chars: Vec<char> = text.chars().collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(c) = chars.get(at).copied() {
        at += 1;
        tokens.push(match c {
            '*' if path && chars.get(at) == Some(&'*') => {
                while chars.get(at) == Some(&'*') {
                    at += 1;
                }
                match chars.get(at) {
                    Some('/') => {
                        at += 1;
                        Token::Directories
                    }
                    Some(_) => Token::Run,
                    None => Token::Rest,
                }
            }
            '*' => Token::Run,
            '?' => Token::Any,
            '[' => class(&chars, &mut at).ok_or(format!("{text:?}: [ without its ]"))?,
            '\\' => Token::One(chars.get(at).copied().inspect(|_| at += 1).unwrap_or('\\')),
            c => Token::One(c),
        });
    }
    Ok(tokens)
}

fn class(chars: &[char], at: &mut usize) -> Option<Token> {
    let negated = matches!(chars.get(*at), Some('^' | '!'));
    *at += usize::from(negated);
    let mut ranges = Vec::new();
    loop {
        let mut low = *chars.get(*at)?;
        *at += 1;
        if low == ']' && !ranges.is_empty() {
            return Some(Token::Class(ranges, negated));
        }
        if low == '\\' {
            low = *chars.get(*at)?;
            *at += 1;
        }
        let mut high = low;
        if chars.get(*at) == Some(&'-') && chars.get(*at + 1).is_some_and(|c| *c != ']') {
            high = *chars.get(*at + 1)?;
            *at += 2;
        }
        ranges.push((low, high));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths() {
        for (pattern, text, expected) in [
            ("*.txt", "a.txt", true),
            ("*.txt", "d/a.txt", false),
            ("d/?.[ch]", "d/a.c", true),
            ("[^a-c]*", "dog", true),
            ("[^a-c]*", "cat", false),
            ("**/x", "x", true),
            ("**/x", "a/b/x", true),
            ("**/x", "ax", false),
            ("a/**/x", "a/x", true),
            ("a/**/x", "a/b/c/x", true),
            ("a/**/x", "a/bx", false),
            ("a/**", "a/b/c", true),
            ("a/**", "b/c", false),
            ("**", "a/b", true),
            ("a\\*", "a*", true),
            ("a\\*", "ab", false),
            ("", "", true),
        ] {
            assert_eq!(Pattern::path(pattern).unwrap().matches(text), expected, "{pattern} {text}");
        }
        assert!(Pattern::path("[a").is_err());
    }

    #[test]
    fn no_pattern_takes_for_ever() {
        let pattern = Pattern::path(&"*a".repeat(500)).unwrap();
        assert!(!pattern.matches(&"a".repeat(400)));
        assert!(!Pattern::path(&"**/".repeat(500)).unwrap().matches(&"a/".repeat(400)[..799]));
    }

    proptest! {
        #[test]
        fn never_panics(pattern in "[a*?/\\[\\]^\\\\-]{0,20}", text in "[a/*]{0,20}") {
            if let Ok(pattern) = Pattern::path(&pattern) {
                let _ = pattern.matches(&text);
            }
        }

        #[test]
        fn a_plain_path_matches_itself_alone(text in "[a-z/.]{0,20}", other in "[a-z/.]{0,20}") {
            let pattern = Pattern::path(&text).unwrap();
            prop_assert!(pattern.matches(&text));
            prop_assert_eq!(pattern.matches(&other), text == other);
        }
    }
}
