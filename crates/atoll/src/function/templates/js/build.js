// Makes function.wasm of app.js. The WIT files of WASI come with jco, newer than what StarlingMonkey (the JavaScript
// engine inside componentize-js) was built against: the numbers are set back in the copy.

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
const { component } = await componentize({ sourcePath: "app.js", witPath: WIT, worldName: "function" });
await writeFile("function.wasm", component);
console.log(`function.wasm: ${component.length} bytes`);
