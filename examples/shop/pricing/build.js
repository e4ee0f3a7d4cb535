// Makes a component of pricing.js. The WIT files of WASI come with jco, one version newer than what StarlingMonkey (the
// JavaScript engine inside componentize-js) was built against: the numbers are set back in the copy.

import { componentize } from "@bytecodealliance/componentize-js";
import { cp, mkdir, readFile, readdir, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";

const BUILTIN = "node_modules/@bytecodealliance/jco/lib/wit/builtin/0.2.12";
const WIT = "node_modules/.wit";

await rm(WIT, { recursive: true, force: true });
await cp("wit", WIT, { recursive: true });
for (const name of await readdir(BUILTIN)) {
    const text = await readFile(join(BUILTIN, name, "package.wit"), "utf8");
    await mkdir(join(WIT, "deps", name), { recursive: true });
    await writeFile(join(WIT, "deps", name, "package.wit"), text.replaceAll("0.2.12", "0.2.10"));
}
const { component } = await componentize({ sourcePath: "pricing.js", witPath: WIT, worldName: "pricing" });
await writeFile("pricing.wasm", component);
console.log(`pricing.wasm: ${component.length} bytes`);
