//! `--chmod`: octal, or chmod(1)'s symbols.

/// What becomes of a mode.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Chmod {
    Exact(u32),
    Clauses(Vec<Clause>),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Clause {
    /// The bits that this clause is about: of the owner, the group, others.
    who: u32,
    operator: char,
    /// `rwxst` as bits for everyone.
    bits: u32,
    /// `X`: execution where it is a directory or somebody may execute it.
    conditional: bool,
    /// `u`, `g`, `o` on the right: copied from there.
    copied: Option<u32>,
}

const ALL: u32 = 0o7777;

impl Chmod {
    pub fn parse(text: &str) -> Result<Chmod, String> {
        let told = || format!("--chmod={text}: write it as an octal number such as 644, or as in u=rwX,go=rX");
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            return u32::from_str_radix(text, 8).ok().filter(|m| *m <= ALL).map(Chmod::Exact).ok_or_else(told);
        }
        let mut clauses = Vec::new();
        for part in text.split(',') {
            let at = part.find(['+', '-', '=']).ok_or_else(told)?;
            let (who, mut rest) = part.split_at(at);
            let mut mask = 0;
            for c in who.chars() {
                mask |= match c {
                    'u' => 0o4700,
                    'g' => 0o2070,
                    'o' => 0o1007,
                    'a' => ALL,
                    _ => return Err(told()),
                };
            }
            let who = if mask == 0 { ALL } else { mask };
            while let Some(operator) = rest.chars().next() {
                rest = rest.get(1..).unwrap_or_default();
                let end = rest.find(['+', '-', '=']).unwrap_or(rest.len());
                let (right, left) = rest.split_at(end);
                rest = left;
                clauses.push(clause(who, operator, right).ok_or_else(told)?);
            }
        }
        Ok(Chmod::Clauses(clauses))
    }

    /// The mode of a file that had `mode`.
    pub fn apply(&self, mode: u32, directory: bool) -> u32 {
        match self {
            Chmod::Exact(exact) => *exact,
            Chmod::Clauses(clauses) => clauses.iter().fold(mode & ALL, |mode, clause| clause.apply(mode, directory)),
        }
    }
}

fn clause(who: u32, operator: char, right: &str) -> Option<Clause> {
    let mut clause = Clause { who, operator, bits: 0, conditional: false, copied: None };
    if let ("u" | "g" | "o", shift) = (right, right) {
        clause.copied = Some(match shift {
            "u" => 6,
            "g" => 3,
            _ => 0,
        });
        return Some(clause);
    }
    for c in right.chars() {
        match c {
            'r' => clause.bits |= 0o444,
            'w' => clause.bits |= 0o222,
            'x' => clause.bits |= 0o111,
            's' => clause.bits |= 0o6000,
            't' => clause.bits |= 0o1000,
            'X' => clause.conditional = true,
            _ => return None,
        }
    }
    Some(clause)
}

impl Clause {
    fn apply(&self, mode: u32, directory: bool) -> u32 {
        let mut bits = self.bits;
        if self.conditional && (directory || mode & 0o111 != 0) {
            bits |= 0o111;
        }
        if let Some(shift) = self.copied {
            bits = (mode >> shift & 7) * 0o111;
        }
        let bits = bits & self.who;
        match self.operator {
            '+' => mode | bits,
            '-' => mode & !bits,
            // A directory's set-id bits are not touched by what does not name them, as chmod(1) has it.
            _ if directory => mode & !(self.who & 0o1777) | bits,
            _ => mode & !self.who | bits,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn as_chmod_does() {
        for (text, mode, directory, expected) in [
            ("644", 0o777, false, 0o644),
            ("u+x", 0o644, false, 0o744),
            ("a-w,u+w", 0o666, false, 0o644),
            ("u=rwX,go=rX", 0o600, false, 0o644),
            ("u=rwX,go=rX", 0o700, true, 0o755),
            ("+x", 0o644, false, 0o755),
            ("g=u", 0o640, false, 0o660),
            ("u+s,o-rwx", 0o755, false, 0o4750),
            ("o+t", 0o755, true, 0o1755),
        ] {
            assert_eq!(Chmod::parse(text).unwrap().apply(mode, directory), expected, "{text}");
        }
        for bad in ["", "8", "99999", "u", "z+x", "u+q", "u=rw,"] {
            assert!(Chmod::parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_mode_stays_a_mode(text in "[ugoa]{0,3}[-+=][rwxXstugo]{0,3}(,[-+=ugox]{0,4})?", mode in 0u32..0o10000) {
            if let Ok(chmod) = Chmod::parse(&text) {
                prop_assert!(chmod.apply(mode, false) <= ALL && chmod.apply(mode, true) <= ALL);
            }
        }
    }
}
