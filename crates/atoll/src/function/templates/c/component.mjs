// Makes a component of core.wasm: the types of wit/ go in, the adapter from WASI preview 1 (what wasi-libc speaks) around.

import { componentEmbed, componentNew, preview1AdapterReactorPath } from "@bytecodealliance/jco";
import { readFile, writeFile } from "node:fs/promises";

// One text of all packages: those the world needs become nested ones.
const nested = async (file) =>
    (await readFile(`wit/deps/${file}`, "utf8")).replace(/^(package [^;]+);/m, "$1 {") + "}\n";
const witSource = (await readFile("wit/world.wit", "utf8")) + (await nested("io.wit")) + (await nested("http.wit"));
const binary = await readFile("core.wasm");
const embedded = await componentEmbed({ binary, witSource, world: "function" });
const adapter = await readFile(preview1AdapterReactorPath());
const component = await componentNew(embedded, [["wasi_snapshot_preview1", adapter]]);
await writeFile("function.wasm", component);
console.log(`function.wasm: ${component.length} bytes`);
