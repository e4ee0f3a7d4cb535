// Prints the packages with this machine's native code that packages in node_modules name as optional and npm left out.

const fs = require("fs");
const path = require("path");

const wanted = new RegExp(`[-.]linux-${process.arch}-gnu$`);
const packages = fs.readdirSync("node_modules").flatMap((name) => {
    if (name.startsWith(".")) return [];
    if (!name.startsWith("@")) return [name];
    return fs.readdirSync(path.join("node_modules", name)).map((inner) => `${name}/${inner}`);
});
const missing = new Set();
for (const name of packages) {
    const file = path.join("node_modules", name, "package.json");
    if (!fs.existsSync(file)) continue;
    const { optionalDependencies = {} } = JSON.parse(fs.readFileSync(file, "utf8"));
    for (const [part, version] of Object.entries(optionalDependencies)) {
        if (wanted.test(part) && !fs.existsSync(path.join("node_modules", part))) missing.add(`${part}@${version}`);
    }
}
console.log([...missing].join(" "));
