// What the browser remembers: conversations and settings for good, the API key until the tab is closed.
const CONVERSATIONS = "benthic.conversations";
const SETTINGS = "benthic.settings";
const KEY = "benthic.key";
const MOST = 100;

function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function conversations() {
  const found = read(CONVERSATIONS, []);
  const sound = (one) => Array.isArray(one?.messages) && one.messages.every((m) => typeof m?.content === "string");
  return Array.isArray(found) ? found.filter(sound) : [];
}

// Other tabs save too: what is theirs is read anew each time. Both return the conversations there are then.
export function save(conversation) {
  return write([conversation, ...conversations().filter((one) => one.id !== conversation.id)]);
}

export function remove(conversation) {
  return write(conversations().filter((one) => one.id !== conversation.id));
}

// The oldest are left out where there are too many, or no room. Where the newest alone has none, what is kept stays.
function write(all) {
  let kept = all.slice(0, MOST);
  while (!put(CONVERSATIONS, JSON.stringify(kept))) {
    if (kept.length <= 1) return all;
    kept = kept.slice(0, -1);
  }
  return kept;
}

// Whether it is kept: a browser may have no room, or be told to keep nothing.
function put(name, value) {
  try {
    localStorage.setItem(name, value);
    return true;
  } catch {
    return false;
  }
}

export function setting(name) {
  return read(SETTINGS, {})[name] ?? "";
}

export function saveSetting(name, value) {
  put(SETTINGS, JSON.stringify({ ...read(SETTINGS, {}), [name]: value }));
}

let keyOfThisPage = "";

export function key() {
  try {
    return sessionStorage.getItem(KEY) ?? keyOfThisPage;
  } catch {
    return keyOfThisPage;
  }
}

export function saveKey(value) {
  keyOfThisPage = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // It lasts as long as the page.
  }
}
