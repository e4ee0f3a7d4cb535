//! Policies made from a seed.

use serde_json::{Value, json};

/// xorshift64*: the same seed, the same policies.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
    fn one_of<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize].clone()
    }
    fn some(&mut self, least: u64, most: u64, mut make: impl FnMut(&mut Dice) -> Value) -> Value {
        let count = least + self.below(most - least + 1);
        (0..count).map(|_| make(self)).collect()
    }
}

pub fn policies(seed: u64) -> Vec<Value> {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let count = 4 + dice.below(12);
    let mut all: Vec<Value> = (0..count).map(|index| policy(&mut dice, index)).collect();
    // Two of three rounds have administrators; some with one priority, where the names decide.
    if dice.below(3) > 0 {
        for index in 0..1 + dice.below(4) {
            let spec = json!({"priority": dice.below(4), "subject": subject(&mut dice)});
            let name = format!("admin-{index}");
            all.push(admin(&mut dice, "AdminNetworkPolicy", &name, spec, &["Allow", "Deny", "Pass"]));
        }
    }
    if dice.below(2) > 0 {
        let spec = json!({"subject": subject(&mut dice)});
        all.push(admin(&mut dice, "BaselineAdminNetworkPolicy", "default", spec, &["Allow", "Deny"]));
    }
    all
}

fn admin(dice: &mut Dice, kind: &str, name: &str, mut spec: Value, actions: &[&str]) -> Value {
    for (rules, peers) in [("ingress", "from"), ("egress", "to")] {
        if dice.below(4) > 0 {
            spec[rules] = dice.some(0, 3, |dice| {
                let mut rule = json!({"action": dice.one_of(actions)});
                rule[peers] = dice.some(1, 2, |dice| admin_peer(dice, rules));
                let nameless = rule[peers].as_array().unwrap().iter().any(|peer| peer["networks"].is_array());
                if dice.below(2) > 0 {
                    rule["ports"] = dice.some(1, 3, |dice| admin_port(dice, !nameless));
                }
                rule
            });
        }
    }
    json!({"kind": kind, "metadata": {"name": name}, "spec": spec})
}

fn subject(dice: &mut Dice) -> Value {
    match dice.below(2) {
        0 => json!({"namespaces": namespace_selector(dice)}),
        _ => json!({"pods": {"namespaceSelector": namespace_selector(dice), "podSelector": pod_selector(dice)}}),
    }
}

fn admin_peer(dice: &mut Dice, rules: &str) -> Value {
    match dice.below(6) {
        0 if rules == "egress" => {
            json!({"networks": dice.one_of(&[json!(["10.42.0.0/28"]), json!(["10.42.0.8/29", "192.0.2.0/24"]),
                json!(["fd00:10:42::/125"])])})
        }
        1 if rules == "egress" => json!({"nodes": {"matchLabels": {"zone": "one"}}}),
        _ => subject(dice),
    }
}

fn admin_port(dice: &mut Dice, named: bool) -> Value {
    let all = [
        json!({"portNumber": {"port": 80}}),
        json!({"portNumber": {"port": 81, "protocol": "UDP"}}),
        json!({"portRange": {"start": 70, "end": 80}}),
        json!({"portRange": {"start": 81, "end": 65535, "protocol": "UDP"}}),
        json!({"portNumber": {"port": 80, "protocol": "SCTP"}}),
        json!({"namedPort": "http"}),
        json!({"namedPort": "none"}),
    ];
    dice.one_of(&all[..if named { 7 } else { 5 }])
}

fn policy(dice: &mut Dice, index: u64) -> Value {
    let types =
        dice.one_of(&[json!(["Ingress"]), json!(["Egress"]), json!(["Ingress", "Egress"]), json!([]), Value::Null]);
    let mut spec = json!({"podSelector": pod_selector(dice)});
    if !types.is_null() {
        spec["policyTypes"] = types;
    }
    if dice.below(5) > 0 {
        spec["ingress"] = dice.some(0, 3, |dice| rule(dice, "from"));
    }
    if dice.below(5) > 1 {
        spec["egress"] = dice.some(0, 3, |dice| rule(dice, "to"));
    }
    json!({"metadata": {"namespace": dice.one_of(&["a", "b", "c"]), "name": format!("policy-{index}")}, "spec": spec})
}

fn rule(dice: &mut Dice, peers: &str) -> Value {
    let mut rule = json!({});
    if dice.below(6) > 0 {
        rule[peers] = dice.some(0, 3, peer);
    }
    if dice.below(2) > 0 {
        rule["ports"] = dice.some(0, 3, port);
    }
    rule
}

fn peer(dice: &mut Dice) -> Value {
    match dice.below(7) {
        0 => {
            let networks = [
                ("0.0.0.0/0", true),
                ("10.42.0.0/16", true),
                ("10.42.0.0/28", true),
                ("10.42.0.8/29", false),
                ("10.42.0.5/32", false),
                ("192.0.2.0/24", false),
                ("::/0", true),
                ("fd00:10:42::/64", true),
                ("fd00:10:42::8/125", false),
                ("2001:db8::/32", false),
            ];
            let (cidr, with_except) = dice.one_of(&networks);
            let inside = match cidr.contains(':') {
                false => ["10.42.0.4/30", "10.42.0.9/32"],
                true => ["fd00:10:42::4/126", "fd00:10:42::9/128"],
            };
            let except = if with_except { dice.some(0, 2, |dice| dice.one_of(&inside).into()) } else { json!([]) };
            json!({"ipBlock": {"cidr": cidr, "except": except}})
        }
        1 | 2 => json!({"podSelector": pod_selector(dice)}),
        3 | 4 => json!({"namespaceSelector": namespace_selector(dice)}),
        _ => json!({"podSelector": pod_selector(dice), "namespaceSelector": namespace_selector(dice)}),
    }
}

fn pod_selector(dice: &mut Dice) -> Value {
    dice.one_of(&[
        json!({}),
        json!({"matchLabels": {"app": "web"}}),
        json!({"matchLabels": {"app": "web", "role": "front"}}),
        json!({"matchLabels": {"app": "nobody"}}),
        json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["api", "db"]}]}),
        json!({"matchExpressions": [{"key": "role", "operator": "NotIn", "values": ["front"]}]}),
        json!({"matchExpressions": [{"key": "role", "operator": "DoesNotExist"}]}),
        json!({"matchLabels": {"role": "back"}, "matchExpressions": [{"key": "app", "operator": "Exists"}]}),
    ])
}

fn namespace_selector(dice: &mut Dice) -> Value {
    dice.one_of(&[
        json!({}),
        json!({"matchLabels": {"team": "two"}}),
        json!({"matchLabels": {"kubernetes.io/metadata.name": "a"}}),
        json!({"matchExpressions": [{"key": "purpose", "operator": "Exists"}]}),
        json!({"matchExpressions": [{"key": "purpose", "operator": "NotIn", "values": ["production"]}]}),
    ])
}

fn port(dice: &mut Dice) -> Value {
    dice.one_of(&[
        json!({"port": 80}),
        json!({"port": 81, "protocol": "TCP"}),
        json!({"port": 80, "protocol": "UDP"}),
        json!({"port": 81, "endPort": 90, "protocol": "UDP"}),
        json!({"port": 70, "endPort": 80}),
        json!({"port": 1, "endPort": 65535, "protocol": "UDP"}),
        json!({"protocol": "UDP"}),
        json!({"protocol": "TCP"}),
        json!({"port": "http"}),
        json!({"port": "http", "protocol": "UDP"}),
        json!({"port": "none"}),
        json!({"port": 80, "protocol": "SCTP"}),
    ])
}
