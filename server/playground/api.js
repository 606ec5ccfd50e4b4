// The server's API: /info, and streams of /generate_stream. Paths are relative to this page, so
// that it works below any prefix of a proxy.

export class ServerError extends Error {
  constructor(message, needsKey = false) {
    super(message);
    this.needsKey = needsKey;
  }
}

function headersFor(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof TypeError && options.headers.Authorization && !/^[\x20-\x7e]*$/.test(options.headers.Authorization))
      throw new ServerError("The API key has characters that no key has.", true);
    throw new ServerError("The server did not answer. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

// What a refused request means, in plain words, with what the server itself said.
async function refusal(response) {
  let said = "";
  try {
    said = ((await response.json()).error ?? "").replace(/\.$/, "");
  } catch {
    // a proxy's page: the status has to do
  }
  const wait = response.headers.get("Retry-After");
  const later = wait ? ` Try again in ${wait} s.` : "";
  switch (response.status) {
    case 401:
      return new ServerError("This server needs an API key, and this is none that it knows.", true);
    case 403:
      return new ServerError("This key may not do that.", true);
    case 422:
      return new ServerError(`The server cannot do this: ${said || "the request is not valid"}.`);
    case 429:
      return new ServerError(`The server is busy: ${said || "too many requests"}.${later}`);
    case 503:
      return new ServerError(`The server takes no requests now: ${said || "not ready"}.${later}`);
    default:
      return new ServerError(said ? `The server said: ${said}.` : `The server answered with status ${response.status}.`);
  }
}

export async function info(key) {
  const response = await ask("info", { headers: headersFor(key) });
  return response.json();
}

// The events of one generation. Aborting the signal closes the connection, which ends the
// generation on the server too.
export async function* generate(body, key, signal) {
  const response = await ask("generate_stream", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headersFor(key) },
    body: JSON.stringify(body),
    signal,
  });
  let complete = false;
  for await (const event of eventsOf(response.body)) {
    if (event.error) throw new ServerError(`The generation ended early: ${event.error}.`);
    yield event;
    complete = event.details !== null;
  }
  if (!complete) throw new ServerError("The connection broke before the end.");
}

async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new ServerError("The connection broke before the end.");
      });
      if (done) return;
      const frames = (rest + value).split("\n\n");
      rest = frames.pop();
      for (const frame of frames) yield JSON.parse(frame.slice("data: ".length));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
