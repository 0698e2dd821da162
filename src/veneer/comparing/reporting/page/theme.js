// Light, dark, or as the system has it: chosen with a button, kept where the browser lets a file keep something.
"use strict";
{
  const root = document.documentElement, KEY = "veneer-theme", THEMES = ["auto", "light", "dark"];
  const kept = () => {
    try {
      const found = localStorage.getItem(KEY);
      return THEMES.includes(found) ? found : "auto";
    } catch {
      return "auto";  // a browser that gives files no storage: the choice holds for this page
    }
  };
  const put = (theme) => {
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
  };
  put(kept());  // before anything is painted
  addEventListener("DOMContentLoaded", () => {
    const button = document.querySelector(".theme");
    const say = (theme) => {
      button.textContent = { auto: "Colours: automatic", light: "Colours: light", dark: "Colours: dark" }[theme];
      button.title = `Change to ${THEMES[(THEMES.indexOf(theme) + 1) % 3]}`;
    };
    let theme = kept();
    say(theme);
    button.hidden = false;
    button.addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % 3];
      put(theme);
      say(theme);
      try {
        localStorage.setItem(KEY, theme);
      } catch {}
    });
    addEventListener("storage", (event) => {
      if (event.key !== KEY) return;  // chosen in another report that is open
      theme = kept();
      put(theme);
      say(theme);
    });
  });
}
