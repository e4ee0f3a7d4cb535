// A function: answers GET with a greeting and POST with what was sent.

async function handle(request) {
    const url = new URL(request.url);
    console.log(`${request.method} ${url.pathname}`);
    const value = request.method === "POST" ? { got: await request.text() } : { hello: url.pathname };
    return new Response(JSON.stringify(value) + "\n", { headers: { "content-type": "application/json" } });
}

addEventListener("fetch", (event) => event.respondWith(handle(event.request)));
