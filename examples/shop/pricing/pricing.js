// The shop's prices as a function: `GET /price?sku=teapot&qty=12` answers with net, discount, tax and total.
// Every request runs in an instance of its own, so nothing here can leak from one customer to the next.

import { getEnvironment } from "wasi:cli/environment@0.2.10";

// Net prices in cents, for whoever asks without `&cents=1999`; the catalog sends its own.
const PRICES = { teapot: 2499, cup: 899, saucer: 499, kettle: 5990 };
const DISCOUNTS = [
    { from: 100, percent: 15 },
    { from: 10, percent: 5 },
];

class BadRequest extends Error {}

// The function's environment: `TAX_PERCENT` in its pod's `env`.
function taxPercent() {
    const entry = getEnvironment().find(([name]) => name === "TAX_PERCENT");
    return entry ? Number(entry[1]) : 19;
}

function whole(text, name, low, high) {
    const number = Number(text);
    if (!Number.isInteger(number) || number < low || number > high) {
        throw new BadRequest(`${name}=${text}: a whole number from ${low} to ${high} is needed`);
    }
    return number;
}

function price(query) {
    const sku = query.get("sku");
    if (!sku) {
        throw new BadRequest("sku is missing: ask for /price?sku=teapot&qty=1");
    }
    const qty = whole(query.get("qty") ?? "1", "qty", 1, 1_000_000);
    const unit = query.has("cents") ? whole(query.get("cents"), "cents", 0, 100_000_000) : PRICES[sku];
    if (unit === undefined) {
        return null;
    }
    const net = unit * qty;
    const percent = DISCOUNTS.find((step) => qty >= step.from)?.percent ?? 0;
    const discount = Math.round((net * percent) / 100);
    const rate = taxPercent();
    const tax = Math.round(((net - discount) * rate) / 100);
    const total = net - discount + tax;
    return { sku, qty, unit, net, discount, discountPercent: percent, tax, taxPercent: rate, total };
}

function answer(status, body) {
    return new Response(JSON.stringify(body) + "\n", { status, headers: { "content-type": "application/json" } });
}

function handle(request) {
    const url = new URL(request.url);
    if (request.method !== "GET") {
        return answer(405, { error: `${request.method} is not possible; use GET` });
    }
    if (url.pathname === "/healthz") {
        return answer(200, { ok: true });
    }
    if (url.pathname !== "/price") {
        return answer(404, { error: `nothing at ${url.pathname}; ask for /price?sku=teapot&qty=1` });
    }
    try {
        const result = price(url.searchParams);
        if (result === null) {
            return answer(404, { error: `no such article: ${url.searchParams.get("sku")}` });
        }
        console.log(`priced ${result.qty} x ${result.sku}: ${result.total}`);
        return answer(200, result);
    } catch (error) {
        if (error instanceof BadRequest) {
            return answer(400, { error: error.message });
        }
        throw error;
    }
}

addEventListener("fetch", (event) => event.respondWith(handle(event.request)));
