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

// The oldest are left out where there are too many, or no room. Returns those that were kept.
export function saveConversations(all) {
  let kept = all.slice(0, MOST);
  while (kept.length) {
    try {
      localStorage.setItem(CONVERSATIONS, JSON.stringify(kept));
      return kept;
    } catch {
      kept = kept.slice(0, -1);
    }
  }
  localStorage.removeItem(CONVERSATIONS);
  return kept;
}

export function setting(name) {
  return read(SETTINGS, {})[name] ?? "";
}

export function saveSetting(name, value) {
  localStorage.setItem(SETTINGS, JSON.stringify({ ...read(SETTINGS, {}), [name]: value }));
}

export function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function saveKey(value) {
  sessionStorage.setItem(KEY, value);
}
